//! A real Kafka broker: one node that is broker and controller.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::Path,
    process::{Command, Stdio},
    sync::Mutex,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};
use rdkafka::{
    ClientConfig, ClientContext, Message, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer},
    error::{KafkaError, RDKafkaErrorCode},
    producer::{BaseProducer, BaseRecord, DeliveryResult, Producer, ProducerContext},
};
use tempfile::TempDir;

use crate::{
    Stop,
    process::{Server, cached, free_port},
    scratch,
};

/// 16 bytes in base 64, as the broker wants it.
const CLUSTER_ID: &str = "Zmxvb2RtYXJrLXRlc3QtMQ";
/// Nobody else talks to the node's own controller.
const CONTROLLER_HOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const STARTS_MAX: u32 = 3;
/// After what silence the cluster takes a broker for gone. On a busy machine one is silent for seconds.
const SESSION: Duration = Duration::from_secs(18);
/// The same of one that is crashed: for so long it can't come back.
const SESSION_IF_CRASHED: Duration = Duration::from_millis(1500);
/// Longest that a client's request may take.
const PATIENCE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(20);

/// What a reader sees of transactions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isolation {
    /// Records of committed transactions, up to the first that is open.
    Committed,
    /// All records, those of open and aborted transactions included.
    Uncommitted,
}

/// A record as it was read.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Record {
    /// Partition.
    pub partition: i32,
    /// Offset in the partition.
    pub offset: i64,
    /// Key; `None` for null.
    pub key: Option<Vec<u8>>,
    /// Value; `None` for a tombstone.
    pub value: Option<Vec<u8>>,
}

impl Record {
    /// The value as text.
    ///
    /// # Panics
    /// If it is none.
    #[must_use]
    pub fn text(&self) -> &str {
        std::str::from_utf8(self.value.as_deref().expect("a value")).expect("text")
    }
}

/// A broker. Ends, with all it holds, when dropped.
pub struct Kafka {
    server: Option<Server>,
    folder: TempDir,
    address: SocketAddr,
}

impl Kafka {
    /// Starts an empty broker on a free port.
    ///
    /// # Errors
    /// When `setup.sh` has not run, or the broker doesn't start.
    pub fn start() -> Result<Self> {
        Self::start_at(Ipv4Addr::LOCALHOST.into())
    }

    /// Starts an empty broker at an address of this machine, by which it is reached from wherever that address is.
    ///
    /// # Errors
    /// See [`Kafka::start`].
    pub fn start_at(host: IpAddr) -> Result<Self> {
        Self::with_session(host, SESSION)
    }

    /// The same for a test that crashes the broker: it can come back at once.
    ///
    /// # Errors
    /// See [`Kafka::start`].
    pub fn start_to_crash(host: IpAddr) -> Result<Self> {
        Self::with_session(host, SESSION_IF_CRASHED)
    }

    fn with_session(host: IpAddr, session: Duration) -> Result<Self> {
        let mut tries = 0;
        loop {
            let folder = scratch::folder("kafka-")?;
            let address = SocketAddr::new(host, free_port(host)?);
            let properties = properties(folder.path(), address, free_port(CONTROLLER_HOST)?, session);
            std::fs::write(folder.path().join("server.properties"), properties)?;
            tries += 1;
            match format(folder.path()).and_then(|()| launch(folder.path(), address)) {
                Ok(server) => return Ok(Self { server: Some(server), folder, address }),
                // Somebody may have taken a port meanwhile.
                Err(_) if tries < STARTS_MAX => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Its address: `127.0.0.1:…`.
    #[must_use]
    pub fn bootstrap(&self) -> String {
        self.address.to_string()
    }

    /// Ends the broker; its data stays.
    ///
    /// # Errors
    /// When it doesn't end.
    pub fn down(&mut self, how: Stop) -> Result<()> {
        match self.server.take() {
            Some(mut server) => server.stop(how),
            None => Ok(()),
        }
    }

    /// Starts the broker again, on the same port and with the same data.
    ///
    /// # Errors
    /// When it doesn't start.
    pub fn up(&mut self) -> Result<()> {
        self.server = Some(launch(self.folder.path(), self.address)?);
        Ok(())
    }

    /// [`Kafka::down`], then [`Kafka::up`].
    ///
    /// # Errors
    /// When it doesn't end, or doesn't start again.
    pub fn restart(&mut self, how: Stop) -> Result<()> {
        self.down(how)?;
        self.up()
    }

    /// Creates a topic with settings such as `("cleanup.policy", "compact")`, and waits until it can be used.
    ///
    /// # Errors
    /// When the broker refuses.
    pub fn create_topic(&self, name: &str, partitions: usize, settings: &[(&str, &str)]) -> Result<()> {
        let admin = self.admin()?;
        let mut topic = NewTopic::new(name, i32::try_from(partitions)?, TopicReplication::Fixed(1));
        for (key, value) in settings {
            topic = topic.set(key, value);
        }
        let created = wait(admin.create_topics(&[topic], &AdminOptions::new()))?;
        for result in created {
            result.map_err(|(topic, code)| anyhow!("create topic {topic}: {code}"))?;
        }
        let consumer = self.consumer(Isolation::Uncommitted)?;
        let start = Instant::now();
        for partition in 0..i32::try_from(partitions)? {
            while let Err(error) = consumer.fetch_watermarks(name, partition, PATIENCE) {
                if start.elapsed() > PATIENCE {
                    return Err(error).with_context(|| format!("wait for topic {name}"));
                }
                std::thread::sleep(PAUSE);
            }
        }
        Ok(())
    }

    /// Deletes a topic.
    ///
    /// # Errors
    /// When the broker refuses.
    pub fn delete_topic(&self, name: &str) -> Result<()> {
        let deleted = wait(self.admin()?.delete_topics(&[name], &AdminOptions::new()))?;
        for result in deleted {
            result.map_err(|(topic, code)| anyhow!("delete topic {topic}: {code}"))?;
        }
        Ok(())
    }

    /// Deletes the records of a partition before an offset, as retention does.
    ///
    /// # Errors
    /// When the broker refuses.
    pub fn delete_records(&self, topic: &str, partition: i32, before: i64) -> Result<()> {
        let mut offsets = TopicPartitionList::new();
        offsets.add_partition_offset(topic, partition, Offset::Offset(before))?;
        let deleted = wait(self.admin()?.delete_records(&offsets, &AdminOptions::new()))?;
        deleted.elements().into_iter().try_for_each(|e| e.error())?;
        Ok(())
    }

    /// Appends records, each a key and a value, to a partition; they are there when this returns.
    ///
    /// # Errors
    /// When one can't be written.
    pub fn produce<K: AsRef<[u8]>, V: AsRef<[u8]>>(
        &self,
        topic: &str,
        partition: i32,
        records: impl IntoIterator<Item = (Option<K>, Option<V>)>,
    ) -> Result<()> {
        let producer = self.producer(&[])?;
        for (key, value) in records {
            let (key, value) = (key.as_ref().map(AsRef::as_ref), value.as_ref().map(AsRef::as_ref));
            send(&producer, topic, partition, key, value)?;
        }
        flush(&producer)
    }

    /// Appends values without keys.
    ///
    /// # Errors
    /// When one can't be written.
    pub fn produce_values<V: AsRef<[u8]>>(
        &self,
        topic: &str,
        partition: i32,
        values: impl IntoIterator<Item = V>,
    ) -> Result<()> {
        self.produce(topic, partition, unkeyed(values))
    }

    /// Appends records in a transaction, and leaves it open.
    ///
    /// # Errors
    /// When the transaction can't be carried out.
    pub fn transaction<K: AsRef<[u8]>, V: AsRef<[u8]>>(
        &self,
        topic: &str,
        partition: i32,
        records: impl IntoIterator<Item = (Option<K>, Option<V>)>,
    ) -> Result<Transaction> {
        let producer = self.producer(&[("transactional.id", &ulid::Ulid::generate().to_string())])?;
        producer.init_transactions(PATIENCE)?;
        producer.begin_transaction()?;
        for (key, value) in records {
            let (key, value) = (key.as_ref().map(AsRef::as_ref), value.as_ref().map(AsRef::as_ref));
            send(&producer, topic, partition, key, value)?;
        }
        flush(&producer)?;
        Ok(Transaction(producer))
    }

    /// Every record of a topic that a reader sees now, by partition and offset.
    ///
    /// # Errors
    /// When the topic can't be read.
    pub fn read(&self, topic: &str, isolation: Isolation) -> Result<Vec<Record>> {
        let consumer = self.consumer(isolation)?;
        let metadata = consumer.fetch_metadata(Some(topic), PATIENCE)?;
        let found = metadata.topics().iter().find(|t| t.name() == topic && t.error().is_none());
        let mut left: BTreeSet<i32> =
            found.with_context(|| format!("no topic {topic}"))?.partitions().iter().map(|p| p.id()).collect();
        let mut assignment = TopicPartitionList::new();
        for partition in &left {
            assignment.add_partition_offset(topic, *partition, Offset::Beginning)?;
        }
        consumer.assign(&assignment)?;
        let (mut records, start) = (Vec::new(), Instant::now());
        while !left.is_empty() {
            match consumer.poll(PAUSE) {
                Some(Ok(message)) => records.push(Record {
                    partition: message.partition(),
                    offset: message.offset(),
                    key: message.key().map(<[u8]>::to_vec),
                    value: message.payload().map(<[u8]>::to_vec),
                }),
                Some(Err(KafkaError::PartitionEOF(partition))) => {
                    left.remove(&partition);
                }
                Some(Err(error)) if start.elapsed() > PATIENCE => return Err(error.into()),
                None if start.elapsed() > PATIENCE => bail!("topic {topic} is not read after {PATIENCE:?}"),
                Some(Err(_)) | None => {}
            }
        }
        records.sort();
        Ok(records)
    }

    /// Every committed record of a topic, by partition and offset.
    ///
    /// # Errors
    /// When the topic can't be read.
    pub fn read_committed(&self, topic: &str) -> Result<Vec<Record>> {
        self.read(topic, Isolation::Committed)
    }

    /// The offsets that a consumer group has committed for a topic's partitions, in their order; `None` where it has none.
    ///
    /// # Errors
    /// When the broker can't tell.
    pub fn group_offsets(&self, group: &str, topic: &str, partitions: i32) -> Result<Vec<Option<i64>>> {
        let consumer: BaseConsumer = self.config(&[("group.id", group)]).create()?;
        let mut asked = TopicPartitionList::new();
        for partition in 0..partitions {
            asked.add_partition(topic, partition);
        }
        let found = consumer.committed_offsets(asked, PATIENCE)?;
        Ok(found
            .elements()
            .iter()
            .map(|e| match e.offset() {
                Offset::Offset(offset) => Some(offset),
                _ => None,
            })
            .collect())
    }

    /// The transactional ids whose transaction is not over.
    ///
    /// # Errors
    /// When the broker's own tool fails.
    pub fn open_transactions(&self) -> Result<Vec<String>> {
        let list = java("org.apache.kafka.tools.TransactionsCommand", "128m")?
            .args(["--bootstrap-server", &self.bootstrap(), "list"])
            .output()?;
        if !list.status.success() {
            bail!("list transactions: {}", String::from_utf8_lossy(&list.stderr));
        }
        let text = String::from_utf8_lossy(&list.stdout).into_owned();
        let open = text.lines().skip(1).filter_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let over = words.last().is_none_or(|s| ["Empty", "CompleteCommit", "CompleteAbort", "Dead"].contains(s));
            (!over).then(|| words[0].to_owned())
        });
        Ok(open.collect())
    }

    fn config(&self, settings: &[(&str, &str)]) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", self.bootstrap()).set("reconnect.backoff.max.ms", "500");
        for (key, value) in settings {
            config.set(*key, *value);
        }
        config
    }

    fn consumer(&self, isolation: Isolation) -> Result<BaseConsumer> {
        let isolation = match isolation {
            Isolation::Committed => "read_committed",
            Isolation::Uncommitted => "read_uncommitted",
        };
        let settings = [
            ("group.id", "floodmark-testkit"),
            ("isolation.level", isolation),
            ("enable.partition.eof", "true"),
            ("enable.auto.commit", "false"),
            ("fetch.wait.max.ms", "20"),
        ];
        Ok(self.config(&settings).create()?)
    }

    fn producer(&self, settings: &[(&str, &str)]) -> Result<BaseProducer<Deliveries>> {
        let mut config = self.config(settings);
        config.set("enable.idempotence", "true").set("allow.auto.create.topics", "false").set("linger.ms", "5");
        Ok(config.create_with_context(Deliveries::default())?)
    }

    fn admin(&self) -> Result<AdminClient<DefaultClientContext>> {
        Ok(self.config(&[]).create()?)
    }
}

/// Records of these values, without keys.
pub fn unkeyed<V>(values: impl IntoIterator<Item = V>) -> impl Iterator<Item = (Option<&'static str>, Option<V>)> {
    values.into_iter().map(|value| (None, Some(value)))
}

/// A transaction that is open until it is ended (or, if it never is, until it times out).
pub struct Transaction(BaseProducer<Deliveries>);

impl Transaction {
    /// Makes its records visible.
    ///
    /// # Errors
    /// When the broker refuses.
    pub fn commit(self) -> Result<()> {
        Ok(self.0.commit_transaction(PATIENCE)?)
    }

    /// Drops its records.
    ///
    /// # Errors
    /// When the broker refuses.
    pub fn abort(self) -> Result<()> {
        Ok(self.0.abort_transaction(PATIENCE)?)
    }
}

fn wait<T>(future: impl Future<Output = Result<T, KafkaError>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(future)?)
}

#[derive(Default)]
struct Deliveries(Mutex<Option<KafkaError>>);

impl ClientContext for Deliveries {}

impl ProducerContext for Deliveries {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        if let Err((error, _)) = result {
            self.0.lock().expect("no panic while locked").get_or_insert_with(|| error.clone());
        }
    }
}

fn send(
    producer: &BaseProducer<Deliveries>,
    topic: &str,
    partition: i32,
    key: Option<&[u8]>,
    value: Option<&[u8]>,
) -> Result<()> {
    let start = Instant::now();
    let mut record = BaseRecord::<[u8], [u8]>::to(topic).partition(partition);
    (record.key, record.payload) = (key, value);
    while let Err((error, back)) = producer.send(record) {
        if error.rdkafka_error_code() != Some(RDKafkaErrorCode::QueueFull) || start.elapsed() > PATIENCE {
            return Err(error.into());
        }
        producer.poll(PAUSE);
        record = back;
    }
    Ok(())
}

fn flush(producer: &BaseProducer<Deliveries>) -> Result<()> {
    let start = Instant::now();
    while producer.in_flight_count() > 0 {
        if start.elapsed() > PATIENCE {
            bail!("records are not delivered after {PATIENCE:?}");
        }
        producer.poll(Duration::from_millis(2));
    }
    match producer.context().0.lock().expect("no panic while locked").take() {
        Some(error) => Err(error).context("deliver a record"),
        None => Ok(()),
    }
}

fn java(main: &str, heap: &str) -> Result<Command> {
    let jars = cached("kafka")?.join("*");
    let mut command = Command::new("java");
    command
        .arg(format!("-Xmx{heap}"))
        .args(["-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xshare:auto"])
        .arg("-Dorg.slf4j.simpleLogger.defaultLogLevel=warn")
        .arg("-cp")
        .arg(jars)
        .arg(main);
    Ok(command)
}

fn format(folder: &Path) -> Result<()> {
    let tool = java("kafka.tools.StorageTool", "128m")?
        .args(["format", "--cluster-id", CLUSTER_ID, "--config"])
        .arg(folder.join("server.properties"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("start java")?;
    let watched = scratch::Watched::new(tool.id())?;
    let output = tool.wait_with_output().context("run java")?;
    drop(watched);
    if !output.status.success() {
        bail!("format the broker's storage: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

fn launch(folder: &Path, address: SocketAddr) -> Result<Server> {
    let mut command = java("kafka.Kafka", "512m")?;
    command.arg(folder.join("server.properties"));
    let client: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", address.to_string())
        .set("reconnect.backoff.max.ms", "100")
        .set_log_level(rdkafka::config::RDKafkaLogLevel::Emerg)
        .create()?;
    Server::start(command, folder, || {
        client.fetch_metadata(None, Duration::from_millis(500)).is_ok_and(|m| !m.brokers().is_empty())
    })
}

fn properties(folder: &Path, address: SocketAddr, controller: u16, session: Duration) -> String {
    let settings = [
        ("process.roles", "broker,controller".to_owned()),
        ("node.id", "1".to_owned()),
        ("controller.quorum.voters", format!("1@{CONTROLLER_HOST}:{controller}")),
        ("listeners", format!("PLAINTEXT://{address},CONTROLLER://{CONTROLLER_HOST}:{controller}")),
        ("advertised.listeners", format!("PLAINTEXT://{address}")),
        ("controller.listener.names", "CONTROLLER".to_owned()),
        ("inter.broker.listener.name", "PLAINTEXT".to_owned()),
        ("log.dirs", folder.join("data").display().to_string()),
        ("offsets.topic.replication.factor", "1".to_owned()),
        ("offsets.topic.num.partitions", "2".to_owned()),
        ("transaction.state.log.replication.factor", "1".to_owned()),
        ("transaction.state.log.min.isr", "1".to_owned()),
        ("transaction.state.log.num.partitions", "2".to_owned()),
        ("group.initial.rebalance.delay.ms", "0".to_owned()),
        ("controller.quorum.election.timeout.ms", "200".to_owned()),
        ("controller.quorum.fetch.timeout.ms", "500".to_owned()),
        ("broker.session.timeout.ms", session.as_millis().to_string()),
        ("broker.heartbeat.interval.ms", "250".to_owned()),
        // Nothing is fetched from followers here, and nothing must be cleaned away under a test.
        ("log.retention.hours", "-1".to_owned()),
        ("log.retention.bytes", "-1".to_owned()),
        // A topic that is missing stays missing: tests rely on it.
        ("auto.create.topics.enable", "false".to_owned()),
    ];
    let mut text = String::new();
    for (key, value) in settings {
        let _ = writeln!(text, "{key}={value}");
    }
    text
}
