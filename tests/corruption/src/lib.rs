//! What the engine makes of storage that is not as it was written.
//!
//! [`specimen`] runs a small job and cuts it off where its storage holds every kind of file: a log, checkpoints in layers with
//! rows in flight and staged output, a savepoint, an orphan. [`damage`] lists everything that is done to the bytes of it, one
//! damage at a time; [`run`] starts the job from what is left, and [`verdict`] holds the outcome against two answers that the
//! engine had no part in: which checkpoints the damaged file belongs to, and what the output must be. [`decoders`] are the
//! readers of all formats with what must hold of them for any bytes: fuzz targets run them, and so do ordinary tests. [`set`] is
//! where golden files lie, which earlier versions have left.
//!
//! Invariant: everything runs on one thread, on a virtual clock, without real files or servers (but for savepoints that are
//! restored by location): the same damage comes to the same end.

pub mod damage;
pub mod decoders;
pub mod job;
pub mod reading;
pub mod run;
pub mod runtime;
pub mod set;
pub mod specimen;
pub mod verdict;
pub mod world;
