//! What the controller counts of itself, in the text format of Prometheus. Nothing is decided by any of it.
//!
//! Requests are counted where they leave the process, so that none is forgotten: [`Counted`] wraps the client's connection.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use tower::{Layer, Service};

/// Media type of the text.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";
/// Upper bounds of the classes into which waiting times fall, milliseconds.
const WAITS_MS: [u64; 9] = [1, 5, 10, 25, 50, 100, 250, 1_000, 5_000];

/// See the header of this file.
#[derive(Debug, Default)]
pub struct Metrics(Mutex<Counts>);

#[derive(Debug, Default)]
struct Counts {
    /// By verb and resource.
    requests: BTreeMap<(&'static str, String), u64>,
    passes: BTreeMap<(&'static str, &'static str), u64>,
    watch_failures: BTreeMap<String, u64>,
    questions: BTreeMap<(&'static str, &'static str), u64>,
    waits: [u64; WAITS_MS.len() + 1],
    waited: Duration,
    due: usize,
    busy: usize,
    jobs: BTreeMap<String, usize>,
    leads: bool,
}

impl Metrics {
    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn request(&self, verb: &'static str, resource: &str) {
        let mut counts = self.counts();
        match counts.requests.get_mut(&(verb, resource.to_owned())) {
            Some(count) => *count += 1,
            None => drop(counts.requests.insert((verb, resource.to_owned()), 1)),
        }
    }

    /// A pass over an object of this kind has ended so.
    pub(crate) fn passed(&self, kind: &'static str, outcome: &'static str) {
        *self.counts().passes.entry((kind, outcome)).or_default() += 1;
    }

    /// A pass has begun so long after it was due.
    pub(crate) fn waited(&self, wait: Duration) {
        let mut counts = self.counts();
        let ms = wait.as_millis();
        let class = WAITS_MS.iter().position(|most| ms <= u128::from(*most)).unwrap_or(WAITS_MS.len());
        counts.waits[class] += 1;
        counts.waited += wait;
    }

    pub(crate) fn watch_failed(&self, what: &str) {
        *self.counts().watch_failures.entry(what.to_owned()).or_default() += 1;
    }

    /// A question of this kind has been answered so.
    pub(crate) fn answered(&self, question: &'static str, answer: &'static str) {
        *self.counts().questions.entry((question, answer)).or_default() += 1;
    }

    /// Passes that are due, and that are under way.
    pub(crate) fn depth(&self, due: usize, busy: usize) {
        let mut counts = self.counts();
        (counts.due, counts.busy) = (due, busy);
    }

    /// Jobs by state.
    pub(crate) fn jobs(&self, jobs: BTreeMap<String, usize>) {
        self.counts().jobs = jobs;
    }

    /// Whether this process leads.
    pub fn leads(&self, leads: bool) {
        self.counts().leads = leads;
    }

    /// See [`Metrics::leads`].
    #[must_use]
    pub fn is_leader(&self) -> bool {
        self.counts().leads
    }

    /// Requests that change something, by verb and resource.
    #[must_use]
    pub fn writes(&self) -> BTreeMap<String, u64> {
        let counts = self.counts();
        let writes = counts.requests.iter().filter(|((verb, _), _)| !matches!(*verb, "get" | "list" | "watch"));
        writes.map(|((verb, resource), n)| (format!("{verb} {resource}"), *n)).collect()
    }

    /// All of it, as text.
    #[must_use]
    pub fn exposition(&self) -> String {
        let counts = self.counts();
        let mut text = String::new();
        let mut family = |name: &str, kind: &str, help: &str, samples: &mut dyn Iterator<Item = (String, String)>| {
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
            for (labels, value) in samples {
                let _ = writeln!(text, "{name}{labels} {value}");
            }
        };
        let requests = counts.requests.iter();
        let mut requests = requests
            .map(|((verb, resource), n)| (format!("{{verb=\"{verb}\",resource=\"{resource}\"}}"), n.to_string()));
        let help = "Requests to the API server.";
        family("floodmark_controller_api_requests_total", "counter", help, &mut requests);
        let mut passes = counts
            .passes
            .iter()
            .map(|((kind, outcome), n)| (format!("{{kind=\"{kind}\",outcome=\"{outcome}\"}}"), n.to_string()));
        family("floodmark_controller_passes_total", "counter", "Passes over an object.", &mut passes);
        let mut failures = counts.watch_failures.iter().map(|(w, n)| (format!("{{kind=\"{w}\"}}"), n.to_string()));
        family("floodmark_controller_watch_failures_total", "counter", "Watches that broke.", &mut failures);
        let mut questions = counts
            .questions
            .iter()
            .map(|((question, answer), n)| (format!("{{question=\"{question}\",answer=\"{answer}\"}}"), n.to_string()));
        let help = "Questions to jobs and storage that were answered.";
        family("floodmark_controller_questions_total", "counter", help, &mut questions);
        let one = |value: usize| std::iter::once((String::new(), value.to_string()));
        family("floodmark_controller_queue_depth", "gauge", "Passes that are due.", &mut one(counts.due));
        family("floodmark_controller_passes_under_way", "gauge", "Passes under way.", &mut one(counts.busy));
        family("floodmark_controller_leads", "gauge", "Whether this process leads.", &mut one(counts.leads.into()));
        let mut jobs = counts.jobs.iter().map(|(state, n)| (format!("{{state=\"{state}\"}}"), n.to_string()));
        family("floodmark_controller_jobs", "gauge", "Jobs by state.", &mut jobs);
        counts.write_waits(&mut text);
        text
    }
}

/// What the system knows of this process, as text; nothing where it does not tell.
#[must_use]
pub fn process() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let resident =
        status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse().ok());
    let name = "process_resident_memory_bytes";
    resident.map_or_else(String::new, |kib: u64| {
        format!("# HELP {name} Resident memory.\n# TYPE {name} gauge\n{name} {}\n", kib << 10)
    })
}

impl Counts {
    fn write_waits(&self, text: &mut String) {
        let name = "floodmark_controller_wait_seconds";
        let _ = writeln!(text, "# HELP {name} From when a pass is due until it begins.\n# TYPE {name} histogram");
        let mut sum = 0;
        for (count, most) in self.waits.iter().zip(WAITS_MS) {
            sum += count;
            let _ = writeln!(text, "{name}_bucket{{le=\"{}\"}} {sum}", Duration::from_millis(most).as_secs_f64());
        }
        let all: u64 = self.waits.iter().sum();
        let _ = writeln!(text, "{name}_bucket{{le=\"+Inf\"}} {all}");
        let _ = writeln!(text, "{name}_sum {}\n{name}_count {all}", self.waited.as_secs_f64());
    }
}

/// Wraps a client's connection so that its requests are counted.
#[derive(Clone, Debug)]
pub struct Counting(pub Arc<Metrics>);

impl<S> Layer<S> for Counting {
    type Service = Counted<S>;

    fn layer(&self, inner: S) -> Counted<S> {
        Counted { inner, metrics: self.0.clone() }
    }
}

/// See [`Counting`].
#[derive(Clone, Debug)]
pub struct Counted<S> {
    inner: S,
    metrics: Arc<Metrics>,
}

impl<S: Service<http::Request<B>>, B> Service<http::Request<B>> for Counted<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<B>) -> S::Future {
        let (verb, resource) = named(request.method(), request.uri());
        self.metrics.request(verb, &resource);
        self.inner.call(request)
    }
}

/// What a request does, and to what: `patch streamjobs/status`.
fn named(method: &http::Method, uri: &http::Uri) -> (&'static str, String) {
    let mut path = uri.path().split('/').filter(|part| !part.is_empty());
    // api/v1 or apis/group/version.
    let skip = if path.next() == Some("api") { 1 } else { 2 };
    let mut rest: Vec<&str> = path.skip(skip).collect();
    if rest.first() == Some(&"namespaces") && rest.len() > 2 {
        rest.drain(..2);
    }
    let resource = match rest[..] {
        [resource, _, part, ..] => format!("{resource}/{part}"),
        [resource, ..] => resource.to_owned(),
        [] => "other".to_owned(),
    };
    let query = uri.query().unwrap_or_default();
    let verb = match *method {
        http::Method::GET if query.split('&').any(|q| q == "watch=true") => "watch",
        http::Method::GET if rest.len() < 2 => "list",
        http::Method::GET => "get",
        http::Method::POST => "create",
        http::Method::PUT => "update",
        http::Method::PATCH => "patch",
        http::Method::DELETE => "delete",
        _ => "other",
    };
    (verb, resource)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_counted_by_what_they_do() {
        for (method, uri, verb, resource) in [
            ("GET", "/api/v1/pods?labelSelector=a&watch=true", "watch", "pods"),
            ("GET", "/api/v1/namespaces/shop/pods?limit=100", "list", "pods"),
            ("GET", "/api/v1/namespaces/shop/secrets/a", "get", "secrets"),
            ("PATCH", "/apis/apps/v1/namespaces/shop/deployments/a?force=true", "patch", "deployments"),
            ("PUT", "/apis/floodmark.io/v1alpha1/namespaces/shop/streamjobs/a/status", "update", "streamjobs/status"),
            ("POST", "/apis/events.k8s.io/v1/namespaces/shop/events", "create", "events"),
        ] {
            let method = method.parse().unwrap();
            assert_eq!(named(&method, &uri.parse().unwrap()), (verb, resource.to_owned()), "{uri}");
        }
    }

    #[test]
    fn what_is_counted_is_told() {
        let metrics = Metrics::default();
        metrics.request("patch", "leases");
        metrics.request("list", "leases");
        metrics.request("patch", "leases");
        metrics.waited(Duration::from_millis(7));
        assert_eq!(metrics.writes(), BTreeMap::from([("patch leases".to_owned(), 2)]));
        let text = metrics.exposition();
        for line in [
            "floodmark_controller_api_requests_total{verb=\"patch\",resource=\"leases\"} 2",
            "floodmark_controller_wait_seconds_bucket{le=\"0.005\"} 0",
            "floodmark_controller_wait_seconds_bucket{le=\"0.01\"} 1",
            "floodmark_controller_wait_seconds_count 1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is missing in\n{text}");
        }
    }
}
