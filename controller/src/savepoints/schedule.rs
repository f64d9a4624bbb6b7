//! When a schedule is due: five fields as in cron, in UTC. Pure.

use chrono::{DateTime, Utc};
use croner::parser::{CronParser, Seconds, Year};
use floodmark_crds::Timestamp;

/// The first time after this one that a schedule is due.
///
/// # Errors
/// When it can't be read, or is never due: why, for people.
pub fn due(schedule: &str, after: Timestamp) -> Result<Timestamp, String> {
    let fields = schedule.split_whitespace().count();
    if fields != 5 {
        return Err(format!(
            "'{schedule}' has {fields} fields; write five: minute, hour, day of month, month, day of week, as in '0 3 * * *'"
        ));
    }
    let parser = CronParser::builder().seconds(Seconds::Disallowed).year(Year::Disallowed).build();
    let cron = parser.parse(schedule).map_err(|e| format!("'{schedule}' is no schedule: {e}"))?;
    let after = DateTime::<Utc>::from_timestamp_millis(after.millis()).ok_or("it is after the end of time")?;
    let next = cron.find_next_occurrence(&after, false);
    let next = next.map_err(|e| format!("'{schedule}' is never due: {e}"))?;
    Ok(Timestamp::from_millis(next.timestamp_millis()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// When a schedule is due after Saturday, 2026-11-21, 10:00:30 UTC.
    fn check(schedule: &str) -> String {
        let after = Timestamp::from_millis(1_795_255_230_000);
        due(schedule, after).map_or_else(|why| why, |at| at.to_string())
    }

    #[test]
    fn a_schedule_is_due_at_whole_minutes_in_utc() {
        for (schedule, at) in [
            ("* * * * *", "2026-11-21T10:01:00Z"),
            ("*/15 * * * *", "2026-11-21T10:15:00Z"),
            ("0 3 * * *", "2026-11-22T03:00:00Z"),
            ("30 22 * * 1-5", "2026-11-23T22:30:00Z"),
            ("0 0 29 2 *", "2028-02-29T00:00:00Z"),
            ("0 0 1 1 MON", "2027-01-01T00:00:00Z"),
            ("0 10 21 11 *", "2027-11-21T10:00:00Z"),
        ] {
            assert_eq!(check(schedule), at, "{schedule}");
        }
    }

    #[test]
    fn what_is_no_schedule_is_refused() {
        for (schedule, why) in [
            ("0 0 3 * * *", "has 6 fields; write five"),
            ("@daily", "has 1 fields"),
            ("61 * * * *", "is no schedule"),
            ("a b c d e", "is no schedule"),
            ("0 0 30 2 *", "is never due"),
        ] {
            assert!(check(schedule).contains(why), "{schedule}: {}", check(schedule));
        }
    }
}
