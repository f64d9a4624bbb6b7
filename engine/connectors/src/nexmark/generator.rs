//! The events themselves: pure functions of a seed and an event's number.
//!
//! The proportions and hot keys are those of the Nexmark benchmark (Tucker et al.; Apache Beam's generator): of 50 events 1
//! is a person, 3 are auctions and 46 are bids; half of the bids go to the newest hundredth auction, three quarters come
//! from hot bidders; bids look back at 100 auctions and 1,000 people.

use std::io::Write as _;

const PERSONS: u64 = 1;
const AUCTIONS: u64 = 3;
const ROUND: u64 = 50;
const FIRST_ID: u64 = 1000;
const AUCTIONS_IN_FLIGHT: u64 = 100;
const PEOPLE_ACTIVE: u64 = 1000;
const HOT_EVERY: u64 = 100;
const LOOK_AHEAD: u64 = 10;

const STATES: [&str; 6] = ["AZ", "CA", "ID", "OR", "WA", "WY"];
const CITIES: [&str; 10] =
    ["Phoenix", "Los Angeles", "San Francisco", "Boise", "Portland", "Bend", "Redmond", "Seattle", "Kent", "Cheyenne"];
const FIRST_NAMES: [&str; 11] =
    ["Peter", "Paul", "Luke", "John", "Saul", "Vicky", "Kate", "Julie", "Sarah", "Deiter", "Walter"];
const LAST_NAMES: [&str; 9] = ["Shultz", "Abrams", "Spencer", "White", "Bartels", "Walton", "Smith", "Jones", "Noris"];
const CHANNELS: [&str; 4] = ["Google", "Facebook", "Baidu", "Apple"];

/// Makes events.
#[derive(Clone, Copy, Debug)]
pub struct Generator {
    /// Equal seeds make equal events.
    pub seed: u64,
    /// Events per second of event time.
    pub events_per_second: u64,
    /// Event time of the first event, milliseconds since the Unix epoch.
    pub start_ms: i64,
}

impl Default for Generator {
    fn default() -> Self {
        // 2026-01-01 00:00:00 UTC.
        Self { seed: 42, events_per_second: 10_000, start_ms: 1_767_225_600_000 }
    }
}

/// Which of the three an event is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Somebody registers.
    Person,
    /// Something is put up for sale.
    Auction,
    /// Somebody bids.
    Bid,
}

/// Randomness of one field of one event.
#[derive(Clone, Copy)]
struct Draw(u64);

impl Draw {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(n)) >> 64) as u64
    }
}

impl Generator {
    /// What event `n` is.
    #[inline]
    #[must_use]
    pub fn kind(&self, n: u64) -> Event {
        match n % ROUND {
            0 => Event::Person,
            rem if rem < PERSONS + AUCTIONS => Event::Auction,
            _ => Event::Bid,
        }
    }

    /// When event `n` happens, milliseconds since the Unix epoch.
    #[inline]
    #[must_use]
    pub fn time_ms(&self, n: u64) -> i64 {
        self.start_ms + (u128::from(n) * 1000 / u128::from(self.events_per_second)) as i64
    }

    fn draw(&self, n: u64, field: u64) -> Draw {
        let mixed = self.seed.wrapping_mul(0xD134_2543_DE82_EF95) ^ n.wrapping_mul(0x2545_F491_4F6C_DD1D);
        Draw(mixed ^ field.wrapping_mul(0xA076_1D64_78BD_642F))
    }

    fn last_person(n: u64) -> u64 {
        n / ROUND
    }

    /// The newest auction at event `n`, counted from 0.
    fn last_auction(n: u64) -> u64 {
        let (round, rem) = (n / ROUND, n % ROUND);
        (round * AUCTIONS + rem.min(AUCTIONS)).saturating_sub(1)
    }

    fn some_person(n: u64, draw: &mut Draw) -> u64 {
        let people = Self::last_person(n) + 1;
        let active = people.min(PEOPLE_ACTIVE);
        people - active + draw.below(active + LOOK_AHEAD)
    }

    /// A price, spread evenly over six decimal orders.
    fn price(draw: &mut Draw) -> i64 {
        let order = (draw.next() >> 11) as f64 / (1_u64 << 53) as f64 * 6.0;
        (10_f64.powf(order) * 100.0).round() as i64
    }

    /// An integer field of event `n`; `None` for a field that is no integer, or not of this event's kind.
    #[must_use]
    pub fn integer(&self, n: u64, field: &str) -> Option<i64> {
        let mut draw = self.draw(n, 1 + field_number(field));
        let id = |counted: u64| (counted + FIRST_ID) as i64;
        Some(match (self.kind(n), field) {
            (Event::Person, "id") => id(Self::last_person(n)),
            (Event::Auction, "id") => id(Self::last_auction(n)),
            (Event::Auction, "initialBid") => Self::price(&mut draw),
            (Event::Auction, "reserve") => self.integer(n, "initialBid")? + Self::price(&mut draw),
            (Event::Auction, "seller") => {
                let hot = draw.below(4) > 0;
                id(if hot { Self::last_person(n) / HOT_EVERY * HOT_EVERY } else { Self::some_person(n, &mut draw) })
            }
            (Event::Auction, "category") => 10 + draw.below(5) as i64,
            (Event::Bid, "auction") => {
                let last = Self::last_auction(n);
                let oldest = last.saturating_sub(AUCTIONS_IN_FLIGHT);
                let hot = draw.below(2) > 0;
                id(if hot { last / HOT_EVERY * HOT_EVERY } else { oldest + draw.below(last - oldest + 1 + LOOK_AHEAD) })
            }
            (Event::Bid, "bidder") => {
                let hot = draw.below(4) > 0;
                id(if hot { Self::last_person(n) / HOT_EVERY * HOT_EVERY + 1 } else { Self::some_person(n, &mut draw) })
            }
            (Event::Bid, "price") => Self::price(&mut draw),
            _ => return None,
        })
    }

    /// A timestamp field of event `n`, milliseconds since the Unix epoch.
    #[must_use]
    pub fn timestamp(&self, n: u64, field: &str) -> Option<i64> {
        match (self.kind(n), field) {
            (_, "dateTime") => Some(self.time_ms(n)),
            (Event::Auction, "expires") => {
                let horizon_ms = AUCTIONS_IN_FLIGHT * ROUND / AUCTIONS * 1000 / self.events_per_second;
                let draw = self.draw(n, 2).below((horizon_ms * 2).max(1));
                Some(self.time_ms(n) + 1 + draw as i64)
            }
            _ => None,
        }
    }

    /// Appends a text field of event `n`. False for a field that is no text, or not of this event's kind.
    pub fn text(&self, n: u64, field: &str, out: &mut String) -> bool {
        let mut draw = self.draw(n, 1 + field_number(field));
        match (self.kind(n), field) {
            (Event::Person, "name") => {
                out.push_str(FIRST_NAMES[draw.below(11) as usize]);
                out.push(' ');
                out.push_str(LAST_NAMES[draw.below(9) as usize]);
            }
            (Event::Person, "emailAddress") => {
                letters(&mut draw, 7, out);
                out.push('@');
                letters(&mut draw, 5, out);
                out.push_str(".com");
            }
            (Event::Person, "creditCard") => {
                for i in 0..4 {
                    if i > 0 {
                        out.push(' ');
                    }
                    digits(draw.below(10_000), 4, out);
                }
            }
            (Event::Person, "city") => out.push_str(CITIES[draw.below(10) as usize]),
            (Event::Person, "state") => out.push_str(STATES[draw.below(6) as usize]),
            (Event::Person, "extra") => filler(&mut draw, 120, out),
            (Event::Auction, "itemName") => {
                let len = 3 + draw.below(17);
                letters(&mut draw, len, out);
            }
            (Event::Auction, "description") => {
                let len = 3 + draw.below(97);
                letters(&mut draw, len, out);
            }
            (Event::Auction, "extra") => filler(&mut draw, 390, out),
            (Event::Bid, "channel") => match self.channel(n) {
                Channel::Hot(i) => out.push_str(CHANNELS[i as usize]),
                Channel::Other(i) => {
                    out.push_str("channel-");
                    out.push_str(&i.to_string());
                }
            },
            (Event::Bid, "url") => self.url(n, out),
            (Event::Bid, "extra") => filler(&mut draw, 68, out),
            _ => return false,
        }
        true
    }

    fn channel(&self, n: u64) -> Channel {
        let mut draw = self.draw(n, 3);
        if draw.below(2) > 0 { Channel::Hot(draw.below(4)) } else { Channel::Other(draw.below(10_000)) }
    }

    fn url(&self, n: u64, out: &mut String) {
        let (mut draw, id) = match self.channel(n) {
            Channel::Hot(i) => (Draw(i * 7919 + 17), None),
            Channel::Other(i) => (Draw(i * 104_729 + 3), Some(i)),
        };
        out.push_str("https://www.nexmark.com/");
        for i in 0..3 {
            if i > 0 {
                out.push('/');
            }
            letters(&mut draw, 5, out);
        }
        out.push_str("/item.htm?query=1");
        if let Some(id) = id.filter(|_| draw.below(10) > 0) {
            out.push_str("&channel_id=");
            out.push_str(&(id as u32).reverse_bits().to_string());
        }
    }

    /// Appends event `n` as a JSON object of all columns, without a newline.
    pub fn write_json(&self, n: u64, out: &mut Vec<u8>) {
        let kind = self.kind(n);
        // Writing to memory does not fail.
        let _ = write!(out, "{{\"event_type\":{}", kind as u8);
        let mut text = String::new();
        for (event, name) in [(Event::Person, "person"), (Event::Auction, "auction"), (Event::Bid, "bid")] {
            let _ = write!(out, ",\"{name}\":");
            if event != kind {
                out.extend_from_slice(b"null");
                continue;
            }
            let mut separator = '{';
            for field in fields(event) {
                let _ = write!(out, "{separator}\"{field}\":");
                separator = ',';
                if let Some(number) = self.integer(n, field) {
                    let _ = write!(out, "{number}");
                } else if let Some(ms) = self.timestamp(n, field) {
                    write_timestamp(ms, out);
                } else {
                    text.clear();
                    self.text(n, field, &mut text);
                    out.push(b'"');
                    out.extend_from_slice(text.as_bytes());
                    out.push(b'"');
                }
            }
            out.push(b'}');
        }
        out.push(b'}');
    }
}

enum Channel {
    Hot(u64),
    Other(u64),
}

fn fields(event: Event) -> &'static [&'static str] {
    match event {
        Event::Person => &["id", "name", "emailAddress", "creditCard", "city", "state", "dateTime", "extra"],
        Event::Auction => &[
            "id",
            "itemName",
            "description",
            "initialBid",
            "reserve",
            "dateTime",
            "expires",
            "seller",
            "category",
            "extra",
        ],
        Event::Bid => &["auction", "bidder", "price", "channel", "url", "dateTime", "extra"],
    }
}

/// Makes the randomness of one field independent of that of the others.
fn field_number(field: &str) -> u64 {
    field.bytes().fold(7_u64, |hash, byte| hash.wrapping_mul(131).wrapping_add(u64::from(byte)))
}

fn letters(draw: &mut Draw, len: u64, out: &mut String) {
    let mut bits = 0;
    for i in 0..len {
        if i % 12 == 0 {
            bits = draw.next();
        }
        out.push(char::from(b'a' + ((bits & 31) % 26) as u8));
        bits >>= 5;
    }
}

/// About `len` letters, give or take a fifth.
fn filler(draw: &mut Draw, len: u64, out: &mut String) {
    let spread = len / 5;
    let len = len - spread + draw.below(2 * spread);
    letters(draw, len, out);
}

fn digits(number: u64, width: u32, out: &mut String) {
    for place in (0..width).rev() {
        out.push(char::from(b'0' + (number / 10_u64.pow(place) % 10) as u8));
    }
}

fn write_timestamp(ms: i64, out: &mut Vec<u8>) {
    let (days, in_day) = (ms.div_euclid(86_400_000), ms.rem_euclid(86_400_000));
    // Civil date from days: eras of 400 years, years that begin in March.
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let day_of_era = z.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (h, m, s, milli) = (in_day / 3_600_000, in_day / 60_000 % 60, in_day / 1000 % 60, in_day % 1000);
    let _ = write!(out, "\"{year:04}-{month:02}-{day:02} {h:02}:{m:02}:{s:02}.{milli:03}\"");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(n: u64) -> serde_json::Value {
        let mut out = Vec::new();
        Generator::default().write_json(n, &mut out);
        serde_json::from_slice(&out).unwrap()
    }

    #[test]
    fn the_same_seed_makes_the_same_events() {
        assert_eq!(json(123_456), json(123_456));
        expect_test::expect![[r#"{"event_type":2,"person":null,"auction":null,"bid":{"auction":1009,"bidder":1001,"price":2003,"channel":"Baidu","url":"https://www.nexmark.com/lhvhg/xkmpi/bifiv/item.htm?query=1","dateTime":"2026-01-01 00:00:00.005","extra":"zeabwqaqcacvdbumnuostlarbqdoeeuyucdppdsdgtuceydpjpidttaehcx"}}"#]].assert_eq(&json(54).to_string());
    }

    #[test]
    fn proportions_and_times_are_those_of_the_benchmark() {
        let generator = Generator::default();
        let bids = (0..5000).filter(|n| generator.kind(*n) == Event::Bid).count();
        assert_eq!(bids, 4600);
        assert_eq!(json(864_000_000 - 50)["person"]["dateTime"], "2026-01-01 23:59:59.995");
        let persons: Vec<_> = (0..3).map(|i| json(i * 50)["person"]["id"].as_i64().unwrap()).collect();
        assert_eq!(persons, [1000, 1001, 1002]);
        let auctions: Vec<_> = [1, 2, 3, 51].map(|n| json(n)["auction"]["id"].as_i64().unwrap()).to_vec();
        assert_eq!(auctions, [1000, 1001, 1002, 1003]);
    }

    #[test]
    fn half_of_the_bids_go_to_a_hot_auction() {
        let generator = Generator::default();
        let hot = (100_000..200_000)
            .filter(|n| generator.kind(*n) == Event::Bid)
            .filter(|n| (generator.integer(*n, "auction").unwrap() - 1000) % 100 == 0)
            .count();
        assert!((44_000..50_000).contains(&hot), "{hot} of 92,000");
    }
}
