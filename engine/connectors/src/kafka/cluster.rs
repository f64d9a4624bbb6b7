//! How to reach a cluster: a table's `properties.*`, checked while the job is planned, and made a client's configuration when it
//! connects. Only then are variables looked up.
//!
//! Invariant: what a variable stands for is in the configuration that a client is made of, and in nothing that is shown.

use std::collections::BTreeMap;

use floodmark_dataflow::{
    connector::{Location, OptionValue, TableDef, TableError},
    variables::Template,
};
use floodmark_snapshot::{Error, Result};
use rdkafka::{
    ClientConfig,
    config::{FromClientConfigAndContext, RDKafkaLogLevel},
    error::KafkaError,
};

use super::client::{Watch, failed};
use crate::options::Options;

/// Prefix of options that go to the client library as they are.
pub(super) const PROPERTIES: &str = "properties.";
/// The Java client's login line.
const LOGIN: &str = "sasl.jaas.config";
/// Values of variables that are shorter than this, bytes, are found everywhere, and hidden nowhere.
const HIDDEN_LENGTH_MIN: usize = 4;
/// Settings that the connector itself looks at: they must be known when the job is planned.
const LOOKED_AT: [&str; 2] = ["group.id", "isolation.level"];

/// Settings of the Java client that mean something else here, or nothing.
const IGNORED: [&str; 12] = [
    "key.deserializer",
    "value.deserializer",
    "key.serializer",
    "value.serializer",
    "auto.offset.reset",
    "enable.auto.commit",
    "enable.auto.offset.store",
    "enable.partition.eof",
    "max.poll.records",
    "max.block.ms",
    "buffer.memory",
    "partition.discovery.interval.ms",
];
/// Settings of the Java client that have another name here.
const RENAMED: [(&str, &str); 2] =
    [("fetch.max.wait.ms", "fetch.wait.max.ms"), ("max.request.size", "message.max.bytes")];
/// Settings that have no counterpart, and what to use instead.
const REFUSED: [(&str, &str); 5] = [
    ("transactional.id", "set 'sink.transactional-id-prefix'"),
    ("transaction.timeout.ms", "set 'sink.transaction-timeout'"),
    ("ssl.truststore.location", "give a PEM file in 'properties.ssl.ca.location'"),
    ("ssl.truststore.password", "give a PEM file in 'properties.ssl.ca.location'"),
    ("ssl.truststore.type", "give a PEM file in 'properties.ssl.ca.location'"),
];

/// See the header of this file.
#[derive(Clone)]
pub(super) struct Cluster {
    table: String,
    servers: String,
    properties: BTreeMap<String, String>,
    /// Those whose value has variables.
    late: Vec<Late>,
}

/// A property whose value has variables.
#[derive(Clone)]
struct Late {
    /// As the library calls it.
    name: String,
    /// As the table calls it.
    option: String,
    location: Location,
    value: Template,
}

impl Cluster {
    /// Reads and checks `properties.*`. Of values with variables nothing is known yet.
    pub(super) fn of(options: &Options<'_>, table: &TableDef) -> Result<Self, TableError> {
        let servers = options.required("properties.bootstrap.servers")?.to_owned();
        let mut cluster = Self { table: table.name.clone(), servers, properties: BTreeMap::new(), late: Vec::new() };
        for (option, given) in &table.options {
            let Some(name) = option.strip_prefix(PROPERTIES) else { continue };
            if IGNORED.contains(&name) {
                tracing::warn!("option '{option}' ({}) has no effect here", given.location);
                continue;
            }
            if let Some((_, instead)) = REFUSED.iter().find(|r| r.0 == name) {
                return Err(TableError::option(given, format!("option '{option}' has no effect here: {instead}")));
            }
            let name = RENAMED.iter().find(|r| r.0 == name).map_or(name, |r| r.1);
            match &given.variables {
                Some(value) => cluster.add_late(name, option, given, value)?,
                None => cluster.add(name, option, given)?,
            }
        }
        Ok(cluster)
    }

    fn add(&mut self, name: &str, option: &str, given: &OptionValue) -> Result<(), TableError> {
        for (name, value) in pairs(name, &given.value).ok_or_else(|| TableError::option(given, no_login(option)))? {
            check(&name, &value).map_err(|why| TableError::option(given, format!("option '{option}': {why}")))?;
            self.properties.insert(name, value);
        }
        Ok(())
    }

    fn add_late(&mut self, name: &str, option: &str, given: &OptionValue, value: &Template) -> Result<(), TableError> {
        if LOOKED_AT.contains(&name) {
            let message =
                format!("option '{option}': a variable can't stand here, because the plan depends on the value");
            return Err(TableError::option(given, message));
        }
        let (name, option, location) = (name.to_owned(), option.to_owned(), given.location);
        self.late.push(Late { name, option, location, value: value.clone() });
        Ok(())
    }

    /// Where the brokers are, as the user wrote it.
    pub(super) fn servers(&self) -> &str {
        &self.servers
    }

    /// What a reader may see: committed records, unless the user has said otherwise.
    pub(super) fn isolation(&self) -> &str {
        self.properties.get("isolation.level").map_or("read_committed", String::as_str)
    }

    /// A configuration: `defaults`, over them what the user wrote, and over that what correctness depends on. Variables have the
    /// values of this process's environment.
    ///
    /// # Errors
    /// When a variable is not set, or what it makes of an option is refused: names table, option, place and variable.
    pub(super) fn config(&self, defaults: &[(&str, &str)], fixed: &[(&str, &str)]) -> Result<Config> {
        self.config_in(defaults, fixed, |name| std::env::var(name).ok())
    }

    fn config_in(
        &self,
        defaults: &[(&str, &str)],
        fixed: &[(&str, &str)],
        value_of: impl Fn(&str) -> Option<String>,
    ) -> Result<Config> {
        let mut client = ClientConfig::new();
        client.set_log_level(RDKafkaLogLevel::Warning);
        // A broker that was away is wanted back at once: the library would wait up to ten seconds between two tries.
        client.set("reconnect.backoff.max.ms", "1000");
        // Half of this passes before a client, which has found the brokers by its first connection, connects to one of them.
        client.set("reconnect.backoff.ms", "20");
        for (name, value) in defaults {
            client.set(*name, *value);
        }
        for (name, value) in &self.properties {
            client.set(name, value);
        }
        let hidden = Hidden::of(self.late.iter().flat_map(|late| late.value.variables()), &value_of);
        for late in &self.late {
            for (name, value) in late.resolve(&value_of, &hidden).map_err(|why| self.wrong(late, &why))? {
                client.set(name, value);
            }
        }
        for (name, value) in fixed {
            client.set(*name, *value);
        }
        Ok(Config { client, hidden })
    }

    fn wrong(&self, late: &Late, why: &str) -> Error {
        let Late { option, location, .. } = late;
        Error::abort(format!("{location}: table '{}': option '{option}': {why}", self.table))
    }
}

impl Late {
    /// The library's settings that it comes to; or why there are none.
    fn resolve(
        &self,
        value_of: impl Fn(&str) -> Option<String>,
        hidden: &Hidden,
    ) -> Result<Vec<(String, String)>, String> {
        let value = self.value.resolve(value_of).map_err(|unset| format!("{unset}: set it where the job runs"))?;
        let pairs = pairs(&self.name, &value).ok_or_else(|| no_login(&self.option))?;
        for (name, value) in &pairs {
            check(name, value).map_err(|why| hidden.hide(&why))?;
        }
        Ok(pairs)
    }
}

/// The library's settings that a property stands for; `None` for a login line that can't be read.
fn pairs(name: &str, value: &str) -> Option<Vec<(String, String)>> {
    if name != LOGIN {
        return Some(vec![(name.to_owned(), value.to_owned())]);
    }
    let (user, password) = jaas(value)?;
    Some(vec![("sasl.username".to_owned(), user), ("sasl.password".to_owned(), password)])
}

fn no_login(option: &str) -> String {
    format!(
        "option '{option}' has no username and password; set 'properties.sasl.username' and 'properties.sasl.password'"
    )
}

/// Whether the library takes a setting by itself; or why not, without a value that must not be shown.
fn check(name: &str, value: &str) -> Result<(), String> {
    let why = match ClientConfig::new().set(name, value).create_native_config() {
        Ok(_) => return Ok(()),
        Err(KafkaError::ClientConfig(..)) if secret(name) => "its value is refused".to_owned(),
        Err(KafkaError::ClientConfig(_, why, ..)) => why,
        Err(other) => other.to_string(),
    };
    Err(why.trim().to_owned())
}

/// Whether a setting's value must not be shown.
fn secret(name: &str) -> bool {
    ["password", "key", "secret", "jaas", "token"].iter().any(|word| name.contains(word))
}

/// User and password of the Java client's login line.
fn jaas(text: &str) -> Option<(String, String)> {
    let value = |name: &str| {
        let rest = text[text.find(name)? + name.len()..].trim_start().strip_prefix('=')?.trim_start();
        let quote = rest.chars().next().filter(|c| matches!(c, '"' | '\''))?;
        let rest = &rest[1..];
        Some(rest[..rest.find(quote)?].to_owned())
    };
    Some((value("username")?, value("password")?))
}

/// A client's configuration, with what variables stand for.
pub(super) struct Config {
    client: ClientConfig,
    hidden: Hidden,
}

impl Config {
    /// Takes a setting out.
    pub(super) fn remove(&mut self, name: &str) {
        self.client.remove(name);
    }

    /// Makes a client; `what` is what it is for.
    pub(super) fn create<T: FromClientConfigAndContext<Watch>>(&self, what: impl std::fmt::Display) -> Result<T> {
        let made = T::from_config_and_context(&self.client, Watch::new(self.hidden.clone()));
        made.map_err(|error| {
            let error = failed(what, &error);
            Error::new(error.disposition(), self.hidden.hide(&error.to_string()))
        })
    }
}

/// What variables stand for, and must not be shown.
#[derive(Clone, Default)]
pub(super) struct Hidden(Vec<(String, String)>);

impl Hidden {
    fn of<'a>(names: impl Iterator<Item = &'a str>, value_of: impl Fn(&str) -> Option<String>) -> Self {
        let hidden = names.filter_map(|name| Some((value_of(name)?, format!("${{{name}}}"))));
        let mut hidden: Vec<_> = hidden.filter(|(value, _)| value.len() >= HIDDEN_LENGTH_MIN).collect();
        // One may be part of another.
        hidden.sort_by_key(|(value, _)| std::cmp::Reverse(value.len()));
        hidden.dedup();
        Self(hidden)
    }

    /// A text in which the variables' names stand for their values.
    pub(super) fn hide(&self, text: &str) -> String {
        self.0.iter().fold(text.to_owned(), |text, (value, shown)| text.replace(value.as_str(), shown))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::datatypes::Schema;

    use super::*;

    const CANARY: &str = "canary-5f2c";

    fn cluster(options: &[(&str, &str)]) -> Result<Cluster, TableError> {
        let given = [("properties.bootstrap.servers", "localhost:1")];
        let location = Location { line: 3, column: 5 };
        let option = |(name, value): &(&str, &str)| ((*name).to_owned(), OptionValue::parse(value, location).unwrap());
        let table = TableDef {
            name: "orders".into(),
            schema: Arc::new(Schema::empty()),
            primary_key: Vec::new(),
            options: given.iter().chain(options).map(option).collect(),
            location,
        };
        Cluster::of(&Options::new(&table, &[], &[PROPERTIES])?, &table)
    }

    /// What the client is set to; or the error.
    fn setting(options: &[(&str, &str)], name: &str) -> Result<String, String> {
        let value_of = |variable: &str| match variable {
            "GONE" => None,
            "LEVEL" => Some("not-a-level".to_owned()),
            _ => Some(format!("{CANARY}-{variable}")),
        };
        let config = cluster(options).unwrap().config_in(&[], &[], value_of).map_err(|e| e.to_string())?;
        Ok(config.client.get(name).unwrap_or("(none)").to_owned())
    }

    #[test]
    fn a_variable_stands_for_its_value_when_the_client_is_made() {
        let cases = [
            ("properties.sasl.password", "${P}", "sasl.password", "canary-5f2c-P"),
            ("properties.sasl.password", "a${P}b$${P}", "sasl.password", "acanary-5f2c-Pb${P}"),
            ("properties.sasl.password", "$${P}", "sasl.password", "${P}"),
            ("properties.client.id", "${A}.${B}", "client.id", "canary-5f2c-A.canary-5f2c-B"),
            ("properties.bootstrap.servers", "${B}:9092", "bootstrap.servers", "canary-5f2c-B:9092"),
            (
                "properties.sasl.jaas.config",
                "X required username=\"u\" password=\"${P}\";",
                "sasl.password",
                "canary-5f2c-P",
            ),
        ];
        for (option, value, name, expected) in cases {
            assert_eq!(setting(&[(option, value)], name).as_deref(), Ok(expected), "{option} = {value}");
        }
    }

    #[test]
    fn a_variable_that_is_not_set_is_named_with_table_option_and_place() {
        expect_test::expect![[
            "line 3, column 5: table 'orders': option 'properties.sasl.password': variable GONE is not set in the environment of \
             this process: set it where the job runs"
        ]]
        .assert_eq(&setting(&[("properties.sasl.password", "x${GONE}")], "").unwrap_err());
    }

    #[test]
    fn what_a_variable_stands_for_is_in_no_error_and_no_line_of_the_clients_log() {
        for (option, value) in [
            ("properties.isolation.level", "${L}"),
            ("properties.acks", "${A}"),
            ("properties.no.such.setting", "${A}"),
            ("properties.sasl.jaas.config", "${A}"),
            ("properties.ssl.ca.location", "/nowhere/${A}"),
            ("properties.debug", "all,${A}"),
        ] {
            let value_of = |name: &str| Some(format!("{CANARY}-{name}"));
            let made = cluster(&[(option, value), ("properties.security.protocol", "ssl")]).map_err(|e| e.to_string());
            let made = made.and_then(|c| c.config_in(&[], &[], value_of).map_err(|e| e.to_string()));
            let made = made
                .and_then(|c| c.create::<rdkafka::consumer::BaseConsumer<Watch>>("read").map_err(|e| e.to_string()));
            let error = made.err().unwrap_or_else(|| panic!("{option} is taken"));
            assert!(!error.contains("canary"), "{option}: {error}");
        }
        let hidden = Hidden::of(["A", "AB", "S"].into_iter(), |name| {
            Some(match name {
                "A" => "secret".to_owned(),
                "AB" => "secret-and-more".to_owned(),
                _ => "1".to_owned(),
            })
        });
        assert_eq!(hidden.hide("1: secret-and-more, secret"), "1: ${AB}, ${A}");
    }

    #[test]
    fn what_the_plan_depends_on_has_no_variables() {
        for option in ["properties.group.id", "properties.isolation.level"] {
            let error = cluster(&[(option, "${X}")]).err().unwrap();
            let expected =
                format!("option '{option}': a variable can't stand here, because the plan depends on the value");
            assert_eq!((error.message, error.location), (expected, Some(Location { line: 3, column: 5 })));
        }
    }

    #[test]
    fn a_java_login_line_is_understood() {
        let line = "org.apache.kafka.common.security.plain.PlainLoginModule required username=\"joe\" password = 's3';";
        assert_eq!(jaas(line), Some(("joe".to_owned(), "s3".to_owned())));
        assert_eq!(jaas("KerberosLoginModule required"), None);
    }
}
