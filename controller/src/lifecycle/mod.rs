//! What becomes of a job, step by step.
