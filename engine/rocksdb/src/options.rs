//! How RocksDB is set up: for random reads of single rows, and for few bytes to upload again.
//!
//! Universal compaction merges runs of like size: a row is rewritten a logarithmic number of times, where levels would rewrite
//! the whole state every few checkpoints, and upload it anew. Reads then meet more runs; whole-key filters skip most of them.
//! Local files need not survive a crash (checkpoints do), so nothing is logged ahead and nothing depends on synchronisation.

use rocksdb::{
    BlockBasedOptions, Cache, DBCompactionStyle, DBCompressionType, IngestExternalFileOptions, LogLevel, Options,
    ReadOptions, UniversalCompactOptions, WriteBufferManager, WriteOptions,
};

/// Bits of filter per key: about 1 % of the keys that are not in a file are looked for all the same.
const FILTER_BITS_PER_KEY: f64 = 10.0;
/// What a read from disk brings in, bytes.
const BLOCK_BYTES: usize = 4 << 10;
/// Files are cut at this size, bytes, if nobody says otherwise: what a restore and an upload handle at a time.
pub(crate) const FILE_BYTES: u64 = 32 << 20;
/// Sorted runs at which compaction begins.
const RUNS: i32 = 6;
/// Threads for flushes and compactions, of all databases together.
const BACKGROUND_THREADS: i32 = 2;
/// Files that one database keeps open.
const OPEN_FILES_MAX: i32 = 512;

/// What the databases of a process share.
pub(crate) struct Shared {
    blocks: Cache,
    memtables: WriteBufferManager,
    memtable_bytes: usize,
    file_bytes: u64,
}

impl Shared {
    pub(crate) fn new(block_cache_bytes: usize, memtable_bytes: usize, file_bytes: u64) -> Self {
        Self {
            blocks: Cache::new_lru_cache(block_cache_bytes),
            memtables: WriteBufferManager::new_write_buffer_manager(memtable_bytes, false),
            memtable_bytes,
            file_bytes,
        }
    }

    /// Options of a database.
    pub(crate) fn database(&self) -> Options {
        let mut options = self.files();
        options.create_if_missing(true);
        options.set_write_buffer_manager(&self.memtables);
        // Half of what all may have: a lone database flushes while it fills the other half.
        options.set_write_buffer_size((self.memtable_bytes / 2).max(1 << 20));
        options.set_max_write_buffer_number(3);
        options.set_max_background_jobs(BACKGROUND_THREADS);
        options.set_max_open_files(OPEN_FILES_MAX);
        options.set_level_zero_file_num_compaction_trigger(RUNS);
        options.set_level_zero_slowdown_writes_trigger(RUNS * 4);
        options.set_level_zero_stop_writes_trigger(RUNS * 6);
        options.set_allow_concurrent_memtable_write(false);
        options.set_log_level(LogLevel::Error);
        options.set_keep_log_file_num(1);
        options.set_stats_dump_period_sec(0);
        options.set_stats_persist_period_sec(0);
        options.set_skip_stats_update_on_db_open(true);
        options
    }

    /// Options of files alone.
    pub(crate) fn files(&self) -> Options {
        let mut blocks = BlockBasedOptions::default();
        blocks.set_block_cache(&self.blocks);
        blocks.set_block_size(BLOCK_BYTES);
        blocks.set_bloom_filter(FILTER_BITS_PER_KEY, false);
        blocks.set_whole_key_filtering(true);
        blocks.set_optimize_filters_for_memory(true);
        blocks.set_format_version(6);
        // Indexes and filters are counted, so that memory has a bound; they go last.
        blocks.set_cache_index_and_filter_blocks(true);
        blocks.set_cache_index_and_filter_blocks_with_high_priority(true);
        blocks.set_pin_l0_filter_and_index_blocks_in_cache(true);
        let mut options = Options::default();
        options.set_block_based_table_factory(&blocks);
        options.set_compression_type(DBCompressionType::Lz4);
        options.set_compaction_style(DBCompactionStyle::Universal);
        options.set_universal_compaction_options(&UniversalCompactOptions::default());
        options.set_target_file_size_base(self.file_bytes);
        options.set_max_subcompactions(1);
        options
    }
}

/// Options of writes: nothing is logged ahead.
pub(crate) fn writes() -> WriteOptions {
    let mut options = WriteOptions::default();
    options.disable_wal(true);
    options
}

/// Options of a scan that is done once: it verifies checksums and pushes nothing out of the cache.
pub(crate) fn scan() -> ReadOptions {
    let mut options = ReadOptions::default();
    options.fill_cache(false);
    options.set_verify_checksums(true);
    options.set_readahead_size(1 << 20);
    options
}

/// Options for taking files over: they are moved, not copied.
pub(crate) fn ingest() -> IngestExternalFileOptions {
    let mut options = IngestExternalFileOptions::default();
    options.set_move_files(true);
    options.set_snapshot_consistency(false);
    options
}
