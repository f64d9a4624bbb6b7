//! The Nexmark queries that are measured, in the dialect that Floodmark and Apache Flink share.

use std::fmt;

use clap::ValueEnum;
use floodmark_tests::events::{HOT_ITEMS, NEXMARK_COLUMNS};

/// A query.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Query {
    /// Every bid as it is.
    Q0,
    /// Prices in another currency.
    Q1,
    /// Bids on a few auctions.
    Q2,
    /// Hot items: the auctions with the most bids in the last 10 seconds, every 2 seconds.
    Q5,
    /// Who sold something within 10 seconds of registering.
    Q8,
    /// Each day's bids on each auction, in figures.
    Q17,
    /// The last bid of each bidder on each auction.
    Q18,
}

impl fmt::Display for Query {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Query {
    /// Its usual name.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Q0 => "q0",
            Self::Q1 => "q1",
            Self::Q2 => "q2",
            Self::Q5 => "q5",
            Self::Q8 => "q8",
            Self::Q17 => "q17",
            Self::Q18 => "q18",
        }
    }

    /// What Floodmark wants to stay below, CPU-seconds per million events.
    pub(crate) fn mark(self) -> Option<f64> {
        match self {
            Self::Q0 => Some(1.2),
            Self::Q5 => Some(2.0),
            Self::Q1 | Self::Q2 | Self::Q8 | Self::Q17 | Self::Q18 => None,
        }
    }

    /// All statements, in order, without semicolons.
    pub(crate) fn statements(self, bootstrap: &str, topic: &str) -> Vec<String> {
        let (columns, select) = self.sink_and_select();
        let mut statements = vec![source(bootstrap, topic)];
        statements.extend(VIEWS.map(str::to_owned));
        statements.push(format!("CREATE TABLE nothing ({columns}) WITH ('connector' = 'blackhole')"));
        statements.push(format!("INSERT INTO nothing {select}"));
        statements
    }

    fn sink_and_select(self) -> (&'static str, String) {
        let (columns, select) = match self {
            Self::Q0 => (
                "auction BIGINT, bidder BIGINT, price BIGINT, `dateTime` TIMESTAMP(3), extra STRING",
                "SELECT auction, bidder, price, `dateTime`, extra FROM bid",
            ),
            Self::Q1 => (
                "auction BIGINT, bidder BIGINT, price DECIMAL(23, 3), `dateTime` TIMESTAMP(3), extra STRING",
                "SELECT auction, bidder, 0.908 * price AS price, `dateTime`, extra FROM bid",
            ),
            Self::Q2 => ("auction BIGINT, price BIGINT", "SELECT auction, price FROM bid WHERE MOD(auction, 123) = 0"),
            Self::Q5 => {
                let select = format!("SELECT AuctionBids.auction, AuctionBids.num\n{HOT_ITEMS}");
                return ("auction BIGINT, num BIGINT", select);
            }
            Self::Q8 => ("id BIGINT, name STRING, stime TIMESTAMP(3)", NEW_USERS),
            // With a key, so that no system tells a row as it was before an update.
            Self::Q17 => (
                "auction BIGINT, `day` STRING, total_bids BIGINT, rank1_bids BIGINT, rank2_bids BIGINT, rank3_bids BIGINT,
  min_price BIGINT, max_price BIGINT, avg_price BIGINT, sum_price BIGINT, PRIMARY KEY (auction, `day`) NOT ENFORCED",
                AUCTION_DAYS,
            ),
            Self::Q18 => (
                "auction BIGINT, bidder BIGINT, price BIGINT, channel STRING, url STRING, `dateTime` TIMESTAMP(3), extra STRING,
  PRIMARY KEY (bidder, auction) NOT ENFORCED",
                LAST_BIDS,
            ),
        };
        (columns, select.to_owned())
    }
}

fn source(bootstrap: &str, topic: &str) -> String {
    format!(
        "CREATE TABLE nexmark ({NEXMARK_COLUMNS}) WITH ('connector' = 'kafka', 'topic' = '{topic}', 'properties.bootstrap.servers' = '{bootstrap}',
  'properties.group.id' = 'bench', 'scan.startup.mode' = 'earliest-offset', 'scan.bounded.mode' = 'latest-offset',
  'format' = 'json')"
    )
}

const VIEWS: [&str; 3] = [
    "CREATE VIEW person AS SELECT person.id, person.name, person.emailAddress, person.creditCard, person.city, person.state,
  `dateTime`, person.extra FROM nexmark WHERE event_type = 0",
    "CREATE VIEW auction AS SELECT auction.id, auction.itemName, auction.description, auction.initialBid, auction.reserve,
  `dateTime`, auction.expires, auction.seller, auction.category, auction.extra FROM nexmark WHERE event_type = 1",
    "CREATE VIEW bid AS SELECT bid.auction, bid.bidder, bid.price, bid.channel, bid.url, `dateTime`, bid.extra
  FROM nexmark WHERE event_type = 2",
];

const NEW_USERS: &str = "SELECT P.id, P.name, P.starttime
FROM (
  SELECT id, name, window_start AS starttime, window_end AS endtime
  FROM TABLE(TUMBLE(TABLE person, DESCRIPTOR(`dateTime`), INTERVAL '10' SECOND))
  GROUP BY id, name, window_start, window_end
) P
JOIN (
  SELECT seller, window_start AS starttime, window_end AS endtime
  FROM TABLE(TUMBLE(TABLE auction, DESCRIPTOR(`dateTime`), INTERVAL '10' SECOND))
  GROUP BY seller, window_start, window_end
) A
ON P.id = A.seller AND P.starttime = A.starttime AND P.endtime = A.endtime";

const AUCTION_DAYS: &str = "SELECT auction, DATE_FORMAT(`dateTime`, 'yyyy-MM-dd') AS `day`,
  count(*) AS total_bids,
  count(*) FILTER (WHERE price < 10000) AS rank1_bids,
  count(*) FILTER (WHERE price >= 10000 AND price < 1000000) AS rank2_bids,
  count(*) FILTER (WHERE price >= 1000000) AS rank3_bids,
  min(price) AS min_price, max(price) AS max_price, avg(price) AS avg_price, sum(price) AS sum_price
FROM bid GROUP BY auction, DATE_FORMAT(`dateTime`, 'yyyy-MM-dd')";

const LAST_BIDS: &str = "SELECT auction, bidder, price, channel, url, `dateTime`, extra
FROM (
  SELECT *, ROW_NUMBER() OVER (PARTITION BY bidder, auction ORDER BY `dateTime` DESC) AS rank_number
  FROM bid
) WHERE rank_number <= 1";
