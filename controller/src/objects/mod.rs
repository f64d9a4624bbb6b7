//! The objects of a job in the cluster. Pure.
