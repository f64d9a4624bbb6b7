//! See `decoders::lists` in tests/corruption.

#![no_main]

use floodmark_corruption::decoders;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    decoders::let_panics_be_caught();
    decoders::lists(data);
});
