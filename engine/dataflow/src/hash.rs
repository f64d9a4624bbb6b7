//! The hash of a key: stable over versions, machines and back ends, because it decides where state lives.
//!
//! It is computed over *values*, column by column, never over an encoding that a library may change. Golden values are in
//! the tests: a change of them would send every key of every retained checkpoint to the wrong subtask.

use arrow::{
    array::{
        Array, ArrayRef, ArrowPrimitiveType, AsArray, BooleanArray, GenericByteArray, PrimitiveArray,
        types::{ByteArrayType, Decimal128Type},
    },
    compute::cast,
    datatypes::{
        DataType, Date32Type, Date64Type, Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type,
        Time32MillisecondType, Time32SecondType, Time64MicrosecondType, Time64NanosecondType, TimeUnit,
        TimestampMicrosecondType, TimestampMillisecondType, TimestampNanosecondType, TimestampSecondType, UInt8Type,
        UInt16Type, UInt32Type, UInt64Type,
    },
};
use floodmark_snapshot::{Error, Result};
use xxhash_rust::xxh3::xxh3_64;

const SEED: u64 = 0x243F_6A88_85A3_08D3;
const NULL: u64 = 0x9E37_79B9_7F4A_7C15;

/// The hash of each row's key. All columns have the same length; without columns every row has the same key.
///
/// # Errors
/// `Abort` for a column type that can't be a key.
pub fn hash_keys(columns: &[ArrayRef], rows: usize) -> Result<Vec<u64>> {
    let mut hashes = vec![SEED; rows];
    for column in columns {
        combine(column, &mut hashes)?;
    }
    Ok(hashes)
}

/// One round of wide multiplication: each bit of the input reaches every bit of the output.
#[inline]
fn mix(hash: u64, value: u64) -> u64 {
    let wide = u128::from(hash ^ value.rotate_left(23)) * u128::from(value ^ 0xD6E8_FEB8_6659_FD93 | 1);
    let folded = (wide as u64) ^ (wide >> 64) as u64;
    let spread = (folded ^ (folded >> 32)).wrapping_mul(0xE703_7ED1_A0B4_28DB);
    spread ^ (spread >> 29) ^ hash.rotate_left(17)
}

fn combine(column: &ArrayRef, hashes: &mut [u64]) -> Result<()> {
    macro_rules! ints {
        ($t:ty) => {
            primitive::<$t>(column, hashes, |v| v as i64 as u64)
        };
    }
    match column.data_type() {
        DataType::Int8 => ints!(Int8Type),
        DataType::Int16 => ints!(Int16Type),
        DataType::Int32 => ints!(Int32Type),
        DataType::Int64 => ints!(Int64Type),
        DataType::UInt8 => ints!(UInt8Type),
        DataType::UInt16 => ints!(UInt16Type),
        DataType::UInt32 => ints!(UInt32Type),
        DataType::UInt64 => ints!(UInt64Type),
        DataType::Date32 => ints!(Date32Type),
        DataType::Date64 => ints!(Date64Type),
        DataType::Time32(TimeUnit::Second) => ints!(Time32SecondType),
        DataType::Time32(_) => ints!(Time32MillisecondType),
        DataType::Time64(TimeUnit::Microsecond) => ints!(Time64MicrosecondType),
        DataType::Time64(_) => ints!(Time64NanosecondType),
        DataType::Timestamp(TimeUnit::Second, _) => ints!(TimestampSecondType),
        DataType::Timestamp(TimeUnit::Millisecond, _) => ints!(TimestampMillisecondType),
        DataType::Timestamp(TimeUnit::Microsecond, _) => ints!(TimestampMicrosecondType),
        DataType::Timestamp(TimeUnit::Nanosecond, _) => ints!(TimestampNanosecondType),
        DataType::Float32 => primitive::<Float32Type>(column, hashes, |v| float_bits(f64::from(v))),
        DataType::Float64 => primitive::<Float64Type>(column, hashes, float_bits),
        DataType::Decimal128(_, _) => {
            primitive::<Decimal128Type>(column, hashes, |v| mix(v as u64, (v >> 64) as u64));
        }
        DataType::Boolean => boolean(column.as_boolean(), hashes),
        DataType::Utf8 => bytes(column.as_string::<i32>(), hashes),
        DataType::LargeUtf8 => bytes(column.as_string::<i64>(), hashes),
        DataType::Binary => bytes(column.as_binary::<i32>(), hashes),
        DataType::LargeBinary => bytes(column.as_binary::<i64>(), hashes),
        DataType::Utf8View => combine(&converted(column, &DataType::Utf8)?, hashes)?,
        DataType::BinaryView => combine(&converted(column, &DataType::Binary)?, hashes)?,
        DataType::Dictionary(_, values) => combine(&converted(column, values)?, hashes)?,
        DataType::Null => hashes.iter_mut().for_each(|h| *h = mix(*h, NULL)),
        other => return Err(Error::abort(format!("a column of type {other} can't be a key"))),
    }
    Ok(())
}

fn converted(column: &ArrayRef, to: &DataType) -> Result<ArrayRef> {
    cast(column, to).map_err(|e| Error::abort(format!("hash key of type {}: {e}", column.data_type())))
}

/// All zeros are one key, and so are all NaNs.
fn float_bits(value: f64) -> u64 {
    if value == 0.0 {
        0
    } else if value.is_nan() {
        f64::NAN.to_bits()
    } else {
        value.to_bits()
    }
}

fn primitive<T: ArrowPrimitiveType>(column: &ArrayRef, hashes: &mut [u64], bits: impl Fn(T::Native) -> u64) {
    let array: &PrimitiveArray<T> = column.as_primitive();
    if array.null_count() == 0 {
        for (hash, value) in hashes.iter_mut().zip(array.values()) {
            *hash = mix(*hash, bits(*value));
        }
    } else {
        for (hash, value) in hashes.iter_mut().zip(array) {
            *hash = mix(*hash, value.map_or(NULL, &bits));
        }
    }
}

fn boolean(array: &BooleanArray, hashes: &mut [u64]) {
    for (hash, value) in hashes.iter_mut().zip(array) {
        *hash = mix(*hash, value.map_or(NULL, u64::from));
    }
}

fn bytes<T: ByteArrayType>(array: &GenericByteArray<T>, hashes: &mut [u64]) {
    for (hash, value) in hashes.iter_mut().zip(array) {
        *hash = mix(*hash, value.map_or(NULL, |v| xxh3_64(v.as_ref())));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{BooleanArray, Float64Array, Int32Array, Int64Array, StringArray, StringViewArray};

    use super::*;

    fn hashes(columns: &[ArrayRef]) -> Vec<u64> {
        hash_keys(columns, columns[0].len()).unwrap()
    }

    #[test]
    fn golden_values_never_change() {
        let ints: ArrayRef = Arc::new(Int64Array::from(vec![Some(0), Some(1), Some(-7), None]));
        let texts: ArrayRef = Arc::new(StringArray::from(vec![Some(""), Some("flood"), Some("mark"), None]));
        let flags: ArrayRef = Arc::new(BooleanArray::from(vec![Some(true), Some(false), None, Some(true)]));
        expect_test::expect![[r#"
            [
                11791935279626899306,
                4975247186576363837,
                14454402757541067762,
                10558558441086918649,
            ]
        "#]]
        .assert_debug_eq(&hashes(&[ints, texts, flags]));
    }

    #[test]
    fn equal_values_hash_alike_whatever_their_layout() {
        let plain: ArrayRef = Arc::new(StringArray::from(vec!["a", "a string longer than twelve bytes"]));
        let view: ArrayRef = Arc::new(StringViewArray::from(vec!["a", "a string longer than twelve bytes"]));
        assert_eq!(hashes(std::slice::from_ref(&plain)), hashes(&[view]));
        let dictionary =
            cast(&plain, &DataType::Dictionary(Box::new(DataType::Int32), Box::new(DataType::Utf8))).unwrap();
        assert_eq!(hashes(std::slice::from_ref(&plain)), hashes(&[dictionary]));
        let short: ArrayRef = Arc::new(Int32Array::from(vec![5]));
        let long: ArrayRef = Arc::new(Int64Array::from(vec![5]));
        assert_eq!(hashes(&[short]), hashes(&[long]));
        let floats: ArrayRef = Arc::new(Float64Array::from(vec![0.0, -0.0, f64::NAN, -f64::NAN]));
        let floats = hashes(&[floats]);
        assert_eq!((floats[0], floats[2]), (floats[1], floats[3]));
    }

    #[test]
    fn successive_numbers_spread_evenly_over_key_groups() {
        for step in [1, 2, 100, 128, 1 << 20] {
            let keys: ArrayRef = Arc::new((0..128_000_i64).map(|i| i * step).collect::<Int64Array>());
            let mut groups = [0_u32; 128];
            for hash in hashes(&[keys]) {
                groups[(hash % 128) as usize] += 1;
            }
            let (least, most) = (groups.iter().min().unwrap(), groups.iter().max().unwrap());
            assert!(*least > 850 && *most < 1150, "step {step}: {least}..{most} of 1000");
        }
    }
}
