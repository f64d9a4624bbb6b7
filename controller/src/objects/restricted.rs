//! The *restricted* profile of Kubernetes' Pod Security Standards, as a walk over a pod's spec; and our own rule beyond it, that
//! nothing writes to the root file system. Pure.

use serde_json::Value as Json;

/// The kinds of volumes that the profile allows.
const VOLUMES: [&str; 8] =
    ["configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"];
/// Kernel parameters that touch nothing but the pod.
const SYSCTLS: [&str; 10] = [
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ping_group_range",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_syncookies",
];
const SECCOMP: [&str; 2] = ["RuntimeDefault", "Localhost"];
const SELINUX: [&str; 5] = ["", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"];

/// What of a pod's spec the profile forbids, a line each with its path. Empty if nothing is.
#[must_use]
pub fn violations(pod: &Json) -> Vec<String> {
    let mut found = Vec::new();
    for field in ["hostNetwork", "hostPID", "hostIPC"] {
        forbid(&mut found, pod[field] == true, field);
    }
    let security = &pod["securityContext"];
    of_security(&mut found, security, "securityContext");
    for (i, sysctl) in items(&security["sysctls"]) {
        let safe = sysctl["name"].as_str().is_some_and(|name| SYSCTLS.contains(&name));
        forbid(&mut found, !safe, &format!("securityContext.sysctls[{i}]"));
    }
    for (i, volume) in items(&pod["volumes"]) {
        let kinds = volume.as_object().into_iter().flatten().map(|(field, _)| field.as_str()).filter(|f| *f != "name");
        for kind in kinds.filter(|kind| !VOLUMES.contains(kind)) {
            found.push(format!("volumes[{i}].{kind} is forbidden"));
        }
    }
    for list in ["initContainers", "containers", "ephemeralContainers"] {
        for (i, container) in items(&pod[list]) {
            of_container(&mut found, container, security, &format!("{list}[{i}]"));
        }
    }
    forbid(&mut found, items(&pod["containers"]).next().is_none(), "containers: none");
    found
}

fn of_container(found: &mut Vec<String>, container: &Json, pod: &Json, path: &str) {
    let security = &container["securityContext"];
    let path_of = |field: &str| format!("{path}.securityContext.{field}");
    of_security(found, security, &format!("{path}.securityContext"));
    forbid(found, security["privileged"] == true, &path_of("privileged"));
    forbid(found, !matches!(security["procMount"].as_str(), None | Some("Default")), &path_of("procMount"));
    require(found, security["allowPrivilegeEscalation"] == false, &path_of("allowPrivilegeEscalation: false"));
    require(found, security["readOnlyRootFilesystem"] == true, &path_of("readOnlyRootFilesystem: true"));
    let non_root = security.get("runAsNonRoot").unwrap_or(&pod["runAsNonRoot"]);
    require(found, *non_root == true, &path_of("runAsNonRoot: true, there or for the pod"));
    let seccomp = security.get("seccompProfile").unwrap_or(&pod["seccompProfile"]);
    let confined = seccomp["type"].as_str().is_some_and(|kind| SECCOMP.contains(&kind));
    require(found, confined, &path_of("seccompProfile: RuntimeDefault or Localhost, there or for the pod"));
    let capabilities = &security["capabilities"];
    require(found, items(&capabilities["drop"]).any(|(_, name)| name == "ALL"), &path_of("capabilities.drop: [ALL]"));
    for (_, name) in items(&capabilities["add"]) {
        forbid(found, name != "NET_BIND_SERVICE", &path_of(&format!("capabilities.add: {name}")));
    }
    for (i, port) in items(&container["ports"]) {
        forbid(found, port["hostPort"].as_i64().unwrap_or(0) != 0, &format!("{path}.ports[{i}].hostPort"));
    }
    for asked in ["livenessProbe", "readinessProbe", "startupProbe"] {
        for way in ["httpGet", "tcpSocket"] {
            forbid(found, container[asked][way].get("host").is_some(), &format!("{path}.{asked}.{way}.host"));
        }
    }
    for hook in ["postStart", "preStop"] {
        for way in ["httpGet", "tcpSocket"] {
            let host = container["lifecycle"][hook][way].get("host");
            forbid(found, host.is_some(), &format!("{path}.lifecycle.{hook}.{way}.host"));
        }
    }
}

/// What is the same for pods and containers.
fn of_security(found: &mut Vec<String>, security: &Json, path: &str) {
    forbid(found, security["runAsUser"] == 0, &format!("{path}.runAsUser: 0"));
    forbid(found, security["seccompProfile"]["type"] == "Unconfined", &format!("{path}.seccompProfile: Unconfined"));
    forbid(found, security["appArmorProfile"]["type"] == "Unconfined", &format!("{path}.appArmorProfile: Unconfined"));
    forbid(found, security["windowsOptions"]["hostProcess"] == true, &format!("{path}.windowsOptions.hostProcess"));
    let selinux = &security["seLinuxOptions"];
    let kind = selinux["type"].as_str().unwrap_or_default();
    forbid(found, !SELINUX.contains(&kind), &format!("{path}.seLinuxOptions.type"));
    for field in ["user", "role"] {
        let set = selinux[field].as_str().is_some_and(|text| !text.is_empty());
        forbid(found, set, &format!("{path}.seLinuxOptions.{field}"));
    }
}

fn items(list: &Json) -> impl Iterator<Item = (usize, &Json)> {
    list.as_array().into_iter().flatten().enumerate()
}

fn forbid(found: &mut Vec<String>, broken: bool, what: &str) {
    if broken {
        found.push(format!("{what} is forbidden"));
    }
}

fn require(found: &mut Vec<String>, kept: bool, what: &str) {
    if !kept {
        found.push(format!("{what} is required"));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn conforming() -> Json {
        json!({
            "securityContext": {"runAsNonRoot": true, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{
                "name": "a",
                "securityContext": {
                    "allowPrivilegeEscalation": false,
                    "readOnlyRootFilesystem": true,
                    "capabilities": {"drop": ["ALL"]},
                },
            }],
            "volumes": [{"name": "a", "emptyDir": {}}],
        })
    }

    #[test]
    fn every_rule_is_seen_to_be_broken() {
        assert_eq!(violations(&conforming()), Vec::<String>::new());
        assert_eq!(violations(&json!({})), ["containers: none is forbidden"]);
        for (pointer, field, value, expected) in [
            ("", "hostNetwork", json!(true), "hostNetwork is forbidden"),
            ("", "hostPID", json!(true), "hostPID is forbidden"),
            ("/volumes/0", "hostPath", json!({"path": "/"}), "volumes[0].hostPath is forbidden"),
            ("/securityContext", "runAsUser", json!(0), "securityContext.runAsUser: 0 is forbidden"),
            (
                "/securityContext",
                "runAsNonRoot",
                json!(false),
                "containers[0].securityContext.runAsNonRoot: true, there or for the pod is required",
            ),
            (
                "/securityContext",
                "sysctls",
                json!([{"name": "kernel.msgmax"}]),
                "securityContext.sysctls[0] is forbidden",
            ),
            (
                "/securityContext",
                "seLinuxOptions",
                json!({"type": "spc_t"}),
                "securityContext.seLinuxOptions.type is forbidden",
            ),
            (
                "/containers/0/securityContext",
                "capabilities",
                json!({"drop": ["ALL"], "add": ["SYS_ADMIN"]}),
                "containers[0].securityContext.capabilities.add: \"SYS_ADMIN\" is forbidden",
            ),
            (
                "/containers/0/securityContext",
                "capabilities",
                json!({"drop": ["KILL"]}),
                "containers[0].securityContext.capabilities.drop: [ALL] is required",
            ),
            (
                "/containers/0/securityContext",
                "allowPrivilegeEscalation",
                json!(true),
                "containers[0].securityContext.allowPrivilegeEscalation: false is required",
            ),
            (
                "/containers/0/securityContext",
                "readOnlyRootFilesystem",
                json!(false),
                "containers[0].securityContext.readOnlyRootFilesystem: true is required",
            ),
            (
                "/containers/0/securityContext",
                "privileged",
                json!(true),
                "containers[0].securityContext.privileged is forbidden",
            ),
            (
                "/containers/0/securityContext",
                "procMount",
                json!("Unmasked"),
                "containers[0].securityContext.procMount is forbidden",
            ),
            ("/containers/0", "ports", json!([{"hostPort": 80}]), "containers[0].ports[0].hostPort is forbidden"),
            (
                "/containers/0",
                "livenessProbe",
                json!({"httpGet": {"host": "a"}}),
                "containers[0].livenessProbe.httpGet.host is forbidden",
            ),
        ] {
            let mut pod = conforming();
            pod.pointer_mut(pointer).unwrap().as_object_mut().unwrap().insert(field.into(), value);
            assert_eq!(violations(&pod), [expected]);
        }
        let mut unconfined = conforming();
        unconfined["securityContext"]["seccompProfile"]["type"] = json!("Unconfined");
        assert_eq!(violations(&unconfined).len(), 2);
        let mut init = conforming();
        init["initContainers"] = json!([{"name": "b"}]);
        assert_eq!(violations(&init).len(), 3);
    }
}
