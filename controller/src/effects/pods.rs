//! What is looked at of a pod: whether it is ready, and what is the matter with it. Pure.

use std::time::Duration;

use floodmark_crds::Timestamp;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod, PodStatus};
use kube::ResourceExt as _;

use crate::{
    lifecycle::{PodsSeen, Trouble, TroubleKind},
    objects::ROLE_LABEL,
};

/// A pod that should be gone for so long, and is still there, is on a node that is lost: nobody can say it is gone.
const LOST_AFTER: Duration = Duration::from_secs(10);
/// Exit codes of our process: it has failed, and says why.
const FAILED: i32 = 1;
/// What it was given can't be run.
const BAD_INPUT: i32 = 2;
/// The storage can't be used, or doesn't allow a start.
const STORAGE: i32 = 4;
/// Longest part of a container's last words that is told, characters.
const WORDS_MAX: usize = 600;

/// See the header of this file.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct PodSeen {
    /// Whether it is a coordinator; else it is a worker.
    pub(super) coordinator: bool,
    pub(super) ready: bool,
    /// Its processes have ended, and it is not started again.
    pub(super) ended: bool,
    /// When it should be gone, if it is being removed.
    pub(super) gone_by: Option<Timestamp>,
    pub(super) trouble: Option<Trouble>,
}

impl PodSeen {
    pub(super) fn of(pod: &Pod) -> Self {
        let gone_by = pod.metadata.deletion_timestamp.as_ref().map(Timestamp::from);
        let status = pod.status.clone().unwrap_or_default();
        let condition = |kind: &str, holds: &str| {
            let mut conditions = status.conditions.iter().flatten();
            conditions.any(|c| c.type_ == kind && c.status == holds)
        };
        let ready = condition("Ready", "True") && gone_by.is_none();
        let trouble = (!ready && gone_by.is_none()).then(|| trouble(&pod.name_any(), &status)).flatten();
        Self {
            coordinator: pod.labels().get(ROLE_LABEL).is_some_and(|role| role == "coordinator"),
            ready,
            ended: matches!(status.phase.as_deref(), Some("Failed" | "Succeeded")),
            gone_by,
            trouble,
        }
    }

    /// When nobody waits any more for it to go.
    pub(super) fn lost_by(&self) -> Option<Timestamp> {
        self.gone_by.map(|at| at.plus(LOST_AFTER))
    }

    /// Whether it counts as there.
    pub(super) fn counts(&self, now: Timestamp) -> bool {
        !self.ended && self.lost_by().is_none_or(|by| now < by)
    }
}

/// Pods of one role. `refused` is why there are not as many as there should be, if some are refused.
pub(super) fn pods_seen<'a>(
    pods: impl Iterator<Item = &'a PodSeen>,
    refused: Option<&str>,
    now: Timestamp,
) -> PodsSeen {
    let mut seen = PodsSeen::default();
    let refused = refused.map(|why| Trouble { kind: TroubleKind::Config, message: format!("pods are refused: {why}") });
    let mut troubles: Vec<&Trouble> = refused.iter().collect();
    for pod in pods.filter(|p| p.counts(now)) {
        seen.count += 1;
        seen.ready += u32::from(pod.ready);
        troubles.extend(&pod.trouble);
    }
    // Of equal ones always the same, or the status would change for nothing.
    troubles.sort_by(|a, b| b.kind.cmp(&a.kind).then_with(|| a.message.cmp(&b.message)));
    seen.trouble = troubles.first().map(|t| (*t).clone());
    seen
}

fn trouble(pod: &str, status: &PodStatus) -> Option<Trouble> {
    let mut conditions = status.conditions.iter().flatten();
    let unschedulable = conditions
        .find(|c| c.type_ == "PodScheduled" && c.status == "False" && c.reason.as_deref() == Some("Unschedulable"));
    let unschedulable = unschedulable.map(|c| Trouble {
        kind: TroubleKind::Unschedulable,
        message: format!(
            "pod {pod}: there is no node for it: {}",
            c.message.as_deref().unwrap_or("no reason is given")
        ),
    });
    let containers = status.init_container_statuses.iter().flatten().chain(status.container_statuses.iter().flatten());
    let troubles = containers.filter_map(|c| of_container(pod, c)).chain(unschedulable);
    troubles.max_by_key(|t| t.kind)
}

fn of_container(pod: &str, container: &ContainerStatus) -> Option<Trouble> {
    let state = container.state.as_ref();
    let waiting = state.and_then(|s| s.waiting.as_ref());
    let last = state.and_then(|s| s.terminated.as_ref());
    let last = last.or_else(|| container.last_state.as_ref().and_then(|s| s.terminated.as_ref()));
    let told =
        |kind, what: &str| Some(Trouble { kind, message: format!("pod {pod}, container {}: {what}", container.name) });
    let last_words = last.filter(|l| l.exit_code != 0).map(|l| {
        let words: String = l.message.as_deref().unwrap_or_default().trim().chars().take(WORDS_MAX).collect();
        match (words.as_str(), l.reason.as_deref()) {
            ("", Some(reason)) => format!("it ended with exit code {} ({reason})", l.exit_code),
            ("", None) => format!("it ended with exit code {}", l.exit_code),
            (words, _) => format!("it ended with exit code {}: {words}", l.exit_code),
        }
    });
    let code = last.map(|l| l.exit_code);
    match (&last_words, code) {
        (Some(words), Some(BAD_INPUT)) => return told(TroubleKind::BadInput, words),
        (Some(words), Some(STORAGE)) => return told(TroubleKind::Storage, words),
        _ => {}
    }
    let waiting = waiting?;
    let reason = waiting.reason.as_deref().unwrap_or_default();
    let message = waiting.message.as_deref().unwrap_or("no more is known");
    match reason {
        "ErrImagePull" | "ImagePullBackOff" | "InvalidImageName" | "ErrImageNeverPull" | "ImageInspectError" => {
            // Of a chain of causes the last: what stands before it is another with each try.
            let cause = message.rsplit(": ").next().unwrap_or(message);
            told(TroubleKind::Image, &format!("its image {} can't be had: {cause}", container.image))
        }
        "CreateContainerConfigError" | "CreateContainerError" | "RunContainerError" => {
            told(TroubleKind::Config, &format!("{reason}: {message}"))
        }
        "CrashLoopBackOff" => {
            let words = last_words.unwrap_or_else(|| "it ended".to_owned());
            let kind = if code == Some(FAILED) { TroubleKind::Ended } else { TroubleKind::Crash };
            told(kind, &format!("it ends again and again; {words}"))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::*;

    fn pod(yaml: &str) -> PodSeen {
        let pod: Pod = serde_yaml::from_str(yaml).unwrap();
        PodSeen::of(&pod)
    }

    fn check(status: &str, kind: Option<TroubleKind>, message: Expect) {
        let seen = pod(&format!("{{metadata: {{name: a-1-worker-x}}, status: {status}}}"));
        assert_eq!(seen.trouble.as_ref().map(|t| t.kind), kind);
        message.assert_eq(&seen.trouble.map_or_else(String::new, |t| t.message));
    }

    fn container(state: &str, last: &str) -> String {
        format!(
            "{{containerStatuses: [{{name: floodmark, image: reg/a:1, imageID: '', ready: false, restartCount: 4, \
             state: {state}, lastState: {last}}}]}}"
        )
    }

    #[test]
    fn what_is_the_matter_is_told_with_what_was_said_last() {
        check("{}", None, expect![""]);
        check(
            "{conditions: [{type: PodScheduled, status: 'False', reason: Unschedulable, message: 0/3 nodes}]}",
            Some(TroubleKind::Unschedulable),
            expect!["pod a-1-worker-x: there is no node for it: 0/3 nodes"],
        );
        check(
            &container(
                "{waiting: {reason: ImagePullBackOff, message: 'Back-off pulling image: ErrImagePull: not found'}}",
                "{}",
            ),
            Some(TroubleKind::Image),
            expect!["pod a-1-worker-x, container floodmark: its image reg/a:1 can't be had: not found"],
        );
        check(
            &container("{waiting: {reason: CreateContainerConfigError, message: secret \"s\" not found}}", "{}"),
            Some(TroubleKind::Config),
            expect![[r#"pod a-1-worker-x, container floodmark: CreateContainerConfigError: secret "s" not found"#]],
        );
        check(
            &container("{waiting: {reason: CrashLoopBackOff}}", "{terminated: {exitCode: 1, message: ' disk full '}}"),
            Some(TroubleKind::Ended),
            expect![
                "pod a-1-worker-x, container floodmark: it ends again and again; it ended with exit code 1: disk full"
            ],
        );
        check(
            &container("{waiting: {reason: CrashLoopBackOff}}", "{terminated: {exitCode: 137, reason: OOMKilled}}"),
            Some(TroubleKind::Crash),
            expect![
                "pod a-1-worker-x, container floodmark: it ends again and again; it ended with exit code 137 (OOMKilled)"
            ],
        );
        check(&container("{waiting: {reason: ContainerCreating}}", "{}"), None, expect![""]);
        check(&container("{running: {}}", "{terminated: {exitCode: 1}}"), None, expect![""]);
    }

    #[test]
    fn a_process_that_can_not_run_what_it_was_given_is_not_waited_for() {
        for state in
            ["{terminated: {exitCode: 2, message: bad SQL}}", "{waiting: {reason: CrashLoopBackOff}}", "{running: {}}"]
        {
            check(
                &container(state, "{terminated: {exitCode: 2, message: bad SQL}}"),
                Some(TroubleKind::BadInput),
                expect!["pod a-1-worker-x, container floodmark: it ended with exit code 2: bad SQL"],
            );
        }
        check(
            &container("{waiting: {reason: CrashLoopBackOff}}", "{terminated: {exitCode: 4, message: no such bucket}}"),
            Some(TroubleKind::Storage),
            expect!["pod a-1-worker-x, container floodmark: it ended with exit code 4: no such bucket"],
        );
    }

    #[test]
    fn only_pods_that_are_there_count() {
        let now = Timestamp::from_millis(1_795_255_200_000);
        let ready = "status: {phase: Running, conditions: [{type: Ready, status: 'True'}]}";
        let at = |deleted: &str| format!("{{metadata: {{name: a{deleted}}}, {ready}}}");
        let pods = [
            pod(&at("")),
            pod(&at(", deletionTimestamp: '2026-11-21T10:00:30Z'")),
            pod(&at(", deletionTimestamp: '2026-11-21T09:59:50Z'")),
            pod("{metadata: {name: a}, status: {phase: Failed, reason: Evicted}}"),
        ];
        let seen = pods_seen(pods.iter(), Some("exceeded quota"), now);
        let trouble = Trouble { kind: TroubleKind::Config, message: "pods are refused: exceeded quota".into() };
        assert_eq!(seen, PodsSeen { count: 2, ready: 1, trouble: Some(trouble) });
        assert_eq!(pods[2].lost_by(), Some(now));
    }
}
