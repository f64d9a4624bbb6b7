//! JSON files that people read with `jq` and that no damage goes unnoticed in: `{"format":1,"crc32c":"…","entry":{…}}`.
//!
//! Every byte is covered: the frame is compared literally, the body by a CRC32C. So what is intact and not understood was written by
//! another program, and is no damage: whoever took it for that would go on from something older.

use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};

use crate::{Error, Result};

const HEAD: &str = "{\"format\":1,\"crc32c\":\"";
const END: &str = "}\n";

/// The bytes of a file whose body stands under `key`.
///
/// # Errors
/// When the body can't be written as JSON.
pub fn seal<T: Serialize>(key: &str, body: &T) -> Result<Bytes> {
    let body = serde_json::to_string(body).map_err(|e| Error::abort(format!("encode {key}: {e}")))?;
    let crc = crc32c::crc32c(body.as_bytes());
    Ok(Bytes::from(format!("{HEAD}{crc:08x}{}{body}{END}", middle(key))))
}

/// Verifies and decodes a file that [`seal`] wrote. `what` names it in errors.
///
/// # Errors
/// `Corrupt` if a single byte is not as it was written; `Abort` if all are, and this program does not understand them.
pub fn open<T: DeserializeOwned>(key: &str, what: &str, bytes: &[u8]) -> Result<T> {
    let corrupt = |reason: &str| Error::corrupt(format!("{what} is damaged: {reason}"));
    let text = std::str::from_utf8(bytes).map_err(|_| corrupt("not UTF-8"))?;
    let rest = text.strip_prefix(HEAD).ok_or_else(|| corrupt("bad frame"))?;
    let (crc, rest) = rest.split_at_checked(8).ok_or_else(|| corrupt("too short"))?;
    let body = rest
        .strip_prefix(middle(key).as_str())
        .and_then(|r| r.strip_suffix(END))
        .ok_or_else(|| corrupt("bad frame"))?;
    if crc != format!("{:08x}", crc32c::crc32c(body.as_bytes())) {
        return Err(corrupt("checksum mismatch"));
    }
    serde_json::from_str(body).map_err(|e| {
        Error::abort(format!(
            "{what} is not damaged, but this program does not understand it ({e}): a later version of floodmark has written it; \
             use that one"
        ))
    })
}

fn middle(key: &str) -> String {
    format!("\",\"{key}\":")
}
