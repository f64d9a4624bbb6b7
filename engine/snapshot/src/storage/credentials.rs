//! How a job's S3 storage is reached by somebody who looks after many jobs: what its Secret says, and nothing of what this process
//! could do by itself. And: secrets stay out of what is shown.
//!
//! Invariant: a Secret names no file of this process, no other source of credentials and no other place to send them; without a
//! key of its own it reaches nothing. No `Debug` output or error shows a value of it but where the storage is.

use std::{collections::BTreeMap, fmt};

use object_store::{
    ClientOptions,
    aws::{AmazonS3Builder, AmazonS3ConfigKey},
};

use crate::{Error, Result};

/// What a Secret may say. Left out is whatever reads a file, asks another server for credentials, or changes how long things take.
const KNOWN: [&str; 21] = [
    "AWS_ACCESS_KEY_ID",
    "AWS_ALLOW_HTTP",
    "AWS_ALLOW_INVALID_CERTIFICATES",
    "AWS_CHECKSUM_ALGORITHM",
    "AWS_CONDITIONAL_PUT",
    "AWS_COPY_IF_NOT_EXISTS",
    "AWS_DEFAULT_REGION",
    "AWS_DISABLE_TAGGING",
    "AWS_ENDPOINT",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_REQUEST_PAYER",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SERVER_SIDE_ENCRYPTION",
    "AWS_SESSION_TOKEN",
    "AWS_SSE_BUCKET_KEY_ENABLED",
    "AWS_SSE_CUSTOMER_KEY_BASE64",
    "AWS_SSE_KMS_KEY_ID",
    "AWS_UNSIGNED_PAYLOAD",
    "AWS_VIRTUAL_HOSTED_STYLE_REQUEST",
];
/// Where nobody says which region.
pub(super) const REGION_DEFAULT: &str = "us-east-1";
/// Where the storage is: shown in errors, because somebody must find it.
const SHOWN: [&str; 5] =
    ["AWS_DEFAULT_REGION", "AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION"];
/// Values in this process's environment that are not shown.
const HIDDEN: [&str; 4] =
    ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SSE_CUSTOMER_KEY_BASE64"];
/// Values shorter than this, bytes, are words such as `true`, and no secrets.
const SECRET_LENGTH_MIN: usize = 6;
/// Longest error that is passed on, bytes: a server may answer anything.
const ERROR_LENGTH_MAX: usize = 2_000;

/// The `AWS_*` pairs of a Secret.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials(BTreeMap<String, String>);

impl Credentials {
    /// Reads the pairs of a Secret; those that are not about storage are left alone.
    ///
    /// # Errors
    /// When there is no access key, or its secret is missing: nothing else stands in for them.
    pub fn of<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Self> {
        let known = pairs.into_iter().filter(|(name, _)| KNOWN.contains(name));
        let pairs: BTreeMap<String, String> = known.map(|(n, v)| (n.to_owned(), v.to_owned())).collect();
        for name in ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"] {
            if pairs.get(name).is_none_or(String::is_empty) {
                return Err(Error::abort(format!("the credentials have no {name}")));
            }
        }
        Ok(Self(pairs))
    }

    /// A client of these pairs over `options`, region and endpoint included.
    pub(super) fn builder(&self, options: ClientOptions) -> AmazonS3Builder {
        let mut builder = AmazonS3Builder::new().with_client_options(options);
        for (name, value) in &self.0 {
            // All that are known here are known there.
            if let Ok(key) = name.to_ascii_lowercase().parse::<AmazonS3ConfigKey>() {
                builder = builder.with_config(key, value);
            }
        }
        let region = self.0.get("AWS_REGION").or_else(|| self.0.get("AWS_DEFAULT_REGION"));
        builder.with_region(region.map_or(REGION_DEFAULT, String::as_str))
    }

    /// What must not be shown of them.
    pub(super) fn secrets(&self) -> Secrets {
        let hidden = self.0.iter().filter(|(name, _)| !SHOWN.contains(&name.as_str()));
        let shown = self.0.iter().filter(|(name, _)| SHOWN.contains(&name.as_str()));
        Secrets::of(hidden.map(|(_, value)| value.clone()).chain(shown.filter_map(|(_, value)| login(value))))
    }
}

/// Names only.
impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// Texts that no error may show.
pub(super) struct Secrets(Vec<String>);

impl Secrets {
    fn of(values: impl Iterator<Item = String>) -> Self {
        let mut secrets: Vec<String> = values.filter(|v| v.len() >= SECRET_LENGTH_MIN).collect();
        // One may be part of another.
        secrets.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
        Self(secrets)
    }

    /// None: of storage that needs none.
    pub(super) fn none() -> Self {
        Self(Vec::new())
    }

    /// Those of this process.
    pub(super) fn of_environment() -> Self {
        let hidden = HIDDEN.iter().filter_map(|name| std::env::var(name).ok());
        let shown = SHOWN.iter().filter_map(|name| login(&std::env::var(name).ok()?));
        Self::of(hidden.chain(shown))
    }

    /// A server's answer as it may be shown: what it says in XML without the rest, which repeats the request; and without secrets.
    pub(super) fn hide(&self, text: &str) -> String {
        let mut shown = plain(text);
        for secret in &self.0 {
            shown = shown.replace(secret.as_str(), "***");
        }
        if shown.len() > ERROR_LENGTH_MAX {
            shown.truncate(shown.floor_char_boundary(ERROR_LENGTH_MAX));
            shown.push('…');
        }
        shown
    }
}

/// The login in a URL, if there is one.
fn login(url: &str) -> Option<String> {
    let (_, rest) = url.split_once("://")?;
    let authority = rest.split('/').next()?;
    authority.rsplit_once('@').map(|(login, _)| login.to_owned())
}

/// The code of an error that S3 sends as XML. The client understands answers about single objects, but not those to listings: there
/// this is all there is.
pub(super) fn code(text: &str) -> Option<&str> {
    element(text, "Code")
}

/// The code and the message of an error that S3 sends as XML; what is no XML stays as it is.
fn plain(text: &str) -> String {
    let begin = text.find("<?xml").or_else(|| text.find("<Error>"));
    match (begin, code(text), element(text, "Message")) {
        (Some(begin), Some(code), Some(message)) => format!("{}{code}: {message}", &text[..begin]),
        (Some(begin), Some(code), None) => format!("{}{code}", &text[..begin]),
        _ => text.to_owned(),
    }
}

fn element<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(&format!("<{name}>"))?;
    rest.split_once(&format!("</{name}>")).map(|(inside, _)| inside)
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "a server of these tests is a thread of its own, and takes real time")]
mod tests {
    use std::{
        io::{Read, Write},
        net::TcpListener,
        time::{Duration, Instant},
    };

    use super::*;
    use crate::storage::{open_existing, open_with};

    const ID: &str = "AKIACANARYKEYID";
    const SECRET: &str = "canary/Secret+Key==";
    const TOKEN: &str = "canary-session-token";

    fn pairs(endpoint: &str) -> Vec<(&str, &str)> {
        vec![
            ("AWS_ACCESS_KEY_ID", ID),
            ("AWS_SECRET_ACCESS_KEY", SECRET),
            ("AWS_SESSION_TOKEN", TOKEN),
            ("AWS_ENDPOINT_URL", endpoint),
            ("AWS_ALLOW_HTTP", "true"),
            ("KAFKA_PASSWORD", "canary-of-kafka"),
        ]
    }

    fn has_canary(text: &str) -> bool {
        text.to_lowercase().contains("canary")
    }

    /// A server that answers each request with this status and whatever it was asked, and counts requests.
    fn echo(status: &'static str) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://user:canary-password@{}", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut asked = vec![0; 16 << 10];
                let n = stream.read(&mut asked).unwrap();
                let asked = String::from_utf8_lossy(&asked[..n]).replace(['\r', '\n'], " ");
                let body = match status.starts_with("403") {
                    true => format!(
                        "<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code><Message>not {ID}</Message><Asked>{asked} {SECRET}</Asked></Error>"
                    ),
                    false => format!("asked {asked} {SECRET}"),
                };
                let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
                stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
            }
        });
        endpoint
    }

    #[test]
    fn only_names_are_shown_of_credentials() {
        let credentials = Credentials::of(pairs("http://user:canary-password@s3.example")).unwrap();
        let shown = format!("{credentials:?}");
        assert!(shown.contains("AWS_SECRET_ACCESS_KEY") && !has_canary(&shown), "{shown}");
        for missing in ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"] {
            let left = pairs("").into_iter().filter(|(name, _)| *name != missing);
            let error = Credentials::of(left).unwrap_err().to_string();
            assert_eq!(error, format!("the credentials have no {missing}"));
        }
    }

    #[test]
    fn what_reads_files_or_asks_others_for_credentials_is_left_alone() {
        let dangerous = [
            ("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/secrets/kubernetes.io/serviceaccount/token"),
            ("AWS_ROLE_ARN", "arn"),
            ("AWS_ENDPOINT_URL_STS", "http://elsewhere"),
            ("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://elsewhere"),
            ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", "/etc/passwd"),
            ("AWS_METADATA_ENDPOINT", "http://elsewhere"),
        ];
        assert!(Credentials::of(dangerous).is_err());
        let both = Credentials::of(pairs("http://s3.example").into_iter().chain(dangerous)).unwrap();
        assert_eq!(both, Credentials::of(pairs("http://s3.example")).unwrap());
        for name in KNOWN {
            assert!(name.to_ascii_lowercase().parse::<AmazonS3ConfigKey>().is_ok(), "{name}");
        }
    }

    #[tokio::test]
    async fn no_error_shows_a_secret_even_if_the_server_repeats_it() {
        for status in ["403 Forbidden", "400 Bad Request", "404 Not Found", "409 Conflict"] {
            let endpoint = echo(status);
            let storage = open_with("s3://bucket/jobs", &Credentials::of(pairs(&endpoint)).unwrap()).unwrap();
            let errors = [
                storage.list("a", None).await.map(|_| ()),
                storage.get("a/b").await.map(|_| ()),
                storage.put("a/b", "x".into()).await,
                storage.put_new("a/b", "x".into()).await.map(|_| ()),
                storage.delete("a/b").await,
            ];
            let errors: Vec<String> = errors.into_iter().filter_map(|r| Some(r.err()?.to_string())).collect();
            assert!(errors.len() >= 2, "{status}: {errors:?}");
            for error in &errors {
                assert!(error.contains("s3://bucket/jobs") && !has_canary(error), "{status}: {error}");
            }
            if status.starts_with("403") {
                let error = storage.list("a", None).await.unwrap_err();
                assert_eq!(error.disposition(), crate::Disposition::Abort, "{error}");
                assert!(errors[0].contains("AccessDenied: not ***"), "{}", errors[0]);
            }
        }
        let wrong = [
            ("AWS_ALLOW_HTTP", "canary-instead-of-true"),
            ("AWS_ACCESS_KEY_ID", ID),
            ("AWS_SECRET_ACCESS_KEY", SECRET),
        ];
        let error = open_with("s3://bucket", &Credentials::of(wrong).unwrap()).err().unwrap().to_string();
        assert!(!has_canary(&error), "{error}");
    }

    #[tokio::test]
    async fn a_storage_that_is_down_or_silent_is_an_error_within_ten_seconds() {
        // Nobody listens; somebody does, and says nothing; somebody has only errors to say.
        let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let broken = echo("500 Internal Server Error");
        let endpoints = [format!("http://{gone}"), format!("http://{}", silent.local_addr().unwrap()), broken];
        let start = Instant::now();
        let asked = endpoints.iter().map(|endpoint| async {
            let storage = open_with("s3://bucket", &Credentials::of(pairs(endpoint)).unwrap()).unwrap();
            let error = storage.list("a", None).await.unwrap_err();
            (error, start.elapsed())
        });
        for (error, took) in futures::future::join_all(asked).await {
            assert_eq!(error.disposition(), crate::Disposition::Retry, "{error}");
            assert!(took < Duration::from_secs(10), "{took:?}: {error}");
            assert!(!has_canary(&error.to_string()), "{error}");
        }
    }

    #[tokio::test]
    async fn with_credentials_of_one_job_nothing_is_opened_with_those_of_this_process() {
        let folder = tempfile::tempdir().unwrap();
        let credentials = Credentials::of(pairs("http://127.0.0.1:1")).unwrap();
        let storage = open_with("s3://bucket/a", &credentials).unwrap();
        let other = storage.open_other("s3://other/b").unwrap();
        assert_eq!(other.describe(), "s3://other/b");
        let error = storage.open_other(folder.path().to_str().unwrap()).err().unwrap().to_string();
        assert!(error.contains("can't be reached from s3://bucket/a"), "{error}");
        assert!(open_with("memory://", &credentials).err().unwrap().to_string().contains("memory"));
        // A folder is no different with credentials, and is not made.
        let local = open_with(folder.path().to_str().unwrap(), &credentials).unwrap();
        assert_eq!(local.list("", None).await.unwrap(), []);
        let missing = folder.path().join("missing");
        assert!(open_with(missing.to_str().unwrap(), &credentials).is_err() && !missing.exists());
        let opened = open_existing(folder.path().to_str().unwrap()).unwrap();
        assert!(opened.open_other(folder.path().to_str().unwrap()).is_ok());
    }

    #[test]
    fn answers_are_cut_to_what_they_say() {
        let secrets = Secrets::of(["secret-1".to_owned(), "secret-1-longer".to_owned(), "true".to_owned()].into_iter());
        let cases = [
            ("403: <?xml?><Error><Code>A</Code><Message>b secret-1</Message><X>y</X></Error>", "403: A: b ***"),
            ("403: <Error><Code>A</Code></Error>", "403: A"),
            ("secret-1-longer is true", "*** is true"),
            ("<html>no</html>", "<html>no</html>"),
            ("<Error><Code>cut", "<Error><Code>cut"),
        ];
        for (text, expected) in cases {
            assert_eq!(secrets.hide(text), expected);
        }
        let long = secrets.hide(&"ä".repeat(ERROR_LENGTH_MAX));
        assert!(long.len() <= ERROR_LENGTH_MAX + '…'.len_utf8());
    }
}
