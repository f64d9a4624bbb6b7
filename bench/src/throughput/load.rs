//! Fills the topic: Nexmark events as JSON, dealt to the partitions in turn, each partition in the order of time.

use std::thread;

use anyhow::{Result, anyhow};
use floodmark_connectors::nexmark::Generator;
use floodmark_testkit::Kafka;
use floodmark_tests::feeder::Writer;

/// Events per second of event time: as the generators of other Nexmark implementations have it.
const EVENT_RATE: u64 = 10_000;

/// Creates the topic and writes the events. Answers with the bytes of their JSON.
pub(crate) fn load(kafka: &Kafka, topic: &str, partitions: i32, events: u64) -> Result<u64> {
    kafka.create_topic(topic, usize::try_from(partitions)?, &[])?;
    let bootstrap = kafka.bootstrap();
    thread::scope(|scope| {
        let writers: Vec<_> = (0..partitions)
            .map(|partition| {
                scope.spawn({
                    let bootstrap = &bootstrap;
                    move || write(bootstrap, topic, partition, partitions, events)
                })
            })
            .collect();
        let mut bytes = 0;
        for writer in writers {
            bytes += writer.join().map_err(|_| anyhow!("a loader panicked"))??;
        }
        Ok(bytes)
    })
}

fn write(bootstrap: &str, topic: &str, partition: i32, partitions: i32, events: u64) -> Result<u64> {
    let writer = Writer::new(bootstrap, topic)?;
    let generator = Generator { events_per_second: EVENT_RATE, ..Generator::default() };
    let (mut json, mut bytes) = (Vec::new(), 0);
    for n in (partition.unsigned_abs().into()..events).step_by(partitions.unsigned_abs() as usize) {
        json.clear();
        generator.write_json(n, &mut json);
        bytes += json.len() as u64;
        writer.write(partition, &json)?;
    }
    writer.flush()?;
    Ok(bytes)
}
