//! Instants as the cluster's API writes them: RFC 3339, in UTC. Pure.

use std::{borrow::Cow, fmt, time::Duration};

use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A wall-clock instant in whole milliseconds since the Unix epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(i64);

impl Timestamp {
    /// The instant so many milliseconds after the Unix epoch.
    #[must_use]
    pub const fn from_millis(millis: i64) -> Self {
        Self(millis)
    }

    /// Milliseconds since the Unix epoch.
    #[must_use]
    pub const fn millis(self) -> i64 {
        self.0
    }

    /// So much later, in whole milliseconds; no later than the end of time.
    #[must_use]
    pub fn plus(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(whole_millis(duration)))
    }

    /// So much earlier, in whole milliseconds; no earlier than the beginning of time.
    #[must_use]
    pub fn minus(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub(whole_millis(duration)))
    }

    /// The time from `earlier` to this; none if it is not earlier.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }
}

fn whole_millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

impl From<&Time> for Timestamp {
    fn from(time: &Time) -> Self {
        Self(time.0.as_millisecond())
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match jiff::Timestamp::from_millisecond(self.0) {
            // Whole seconds are written without a fraction.
            Ok(instant) => write!(f, "{instant}"),
            Err(_) => f.write_str("an instant out of range"),
        }
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<str>::deserialize(deserializer)?;
        let instant: jiff::Timestamp =
            text.parse().map_err(|e| de::Error::custom(format!("'{text}' is no time: {e}")))?;
        Ok(Self(instant.as_millisecond()))
    }
}

impl JsonSchema for Timestamp {
    fn schema_name() -> Cow<'static, str> {
        "Timestamp".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "format": "date-time"})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instants_are_written_as_rfc_3339_and_read_back() {
        for (millis, text) in [(0, "1970-01-01T00:00:00Z"), (1_795_000_000_250, "2026-11-18T11:06:40.25Z")] {
            let instant = Timestamp::from_millis(millis);
            assert_eq!(instant.to_string(), text);
            let json = serde_json::to_string(&instant).unwrap();
            assert_eq!(serde_json::from_str::<Timestamp>(&json).unwrap(), instant);
        }
        let error = serde_json::from_str::<Timestamp>("\"yesterday\"").unwrap_err().to_string();
        assert!(error.contains("'yesterday' is no time"), "{error}");
    }

    #[test]
    fn time_that_went_backwards_is_none() {
        let (early, late) = (Timestamp::from_millis(1_000), Timestamp::from_millis(3_500));
        assert_eq!((late.since(early), early.since(late)), (Duration::from_millis(2_500), Duration::ZERO));
    }

    #[test]
    fn time_goes_on_by_durations_and_never_over_its_ends() {
        let at = Timestamp::from_millis(1_000);
        assert_eq!(at.plus(Duration::from_micros(2_500_900)).millis(), 3_500);
        assert_eq!(at.minus(Duration::from_secs(2)).millis(), -1_000);
        assert_eq!(
            (at.plus(Duration::MAX).millis(), Timestamp::from_millis(-2).minus(Duration::MAX).millis()),
            (i64::MAX, i64::MIN)
        );
    }
}
