//! The objects of a job in the cluster. Pure.

/// What the names of a job's objects begin with.
#[must_use]
pub fn base(job: &str) -> String {
    job.to_owned()
}
