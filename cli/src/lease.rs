//! What a coordinator in a cluster is told of where it is: its arguments, and the variables that its pod gives it.

use std::net::IpAddr;

use floodmark_worker::leadership::{Candidate, LeaseName, Rhythm};

use crate::{args::LeaseArgs, exit::Failure, run};

/// A Lease that this process wants to hold.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct LeaseWanted {
    /// Which.
    pub(crate) name: LeaseName,
    /// How often it is renewed.
    pub(crate) rhythm: Rhythm,
    /// The run that it is for.
    pub(crate) run: u64,
    identity: String,
    ip: Option<IpAddr>,
}

impl LeaseWanted {
    /// What the arguments and this process's variables say.
    ///
    /// # Errors
    /// When a variable can't be read.
    pub(crate) fn of(args: &LeaseArgs) -> Result<Option<Self>, Failure> {
        Self::read(args, |name| std::env::var(name).ok())
    }

    fn read(args: &LeaseArgs, variable: impl Fn(&str) -> Option<String>) -> Result<Option<Self>, Failure> {
        // Whoever gives one gives the other: so the arguments are declared.
        let (Some(lease), Some(run)) = (&args.lease, args.run_number) else { return Ok(None) };
        let variable = |name: &str| variable(name).map(|v| v.trim().to_owned()).filter(|v| !v.is_empty());
        let ip = variable("POD_IP").map(|text| {
            text.parse()
                .map_err(|e| Failure::input(format!("the variable POD_IP is '{text}', which is no address: {e}")))
        });
        Ok(Some(Self {
            name: LeaseName { namespace: variable("POD_NAMESPACE"), name: lease.clone() },
            rhythm: if args.standby { Rhythm::STANDBY } else { Rhythm::ALONE },
            identity: variable("POD_NAME").or_else(|| variable("HOSTNAME")).unwrap_or_else(run::host),
            run,
            ip: ip.transpose()?,
        }))
    }

    /// Who this process is in the election. It answers HTTP at this port.
    pub(crate) fn candidate(&self, port: Option<u16>, parallelism: u32) -> Candidate {
        let http = self.ip.zip(port).map(|(ip, port)| std::net::SocketAddr::new(ip, port).to_string());
        Candidate { identity: self.identity.clone(), run: self.run, http: http.unwrap_or_default(), parallelism }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Args, Command};

    fn args(words: &str) -> Result<LeaseArgs, String> {
        let words = format!("floodmark coordinator job.yaml --listen :1 --identity /i {words}");
        match Args::try_parse_from(words.split_whitespace()).map_err(|e| e.to_string())?.command {
            Command::Coordinator(args) => Ok(args.lease),
            other => Err(format!("{other:?}")),
        }
    }

    fn read(words: &str, variables: &[(&str, &str)]) -> Result<Option<LeaseWanted>, String> {
        let variable = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned());
        LeaseWanted::read(&args(words)?, variable).map_err(|e| e.message)
    }

    #[test]
    fn a_pod_says_who_and_where_it_is() {
        let pod = [("POD_NAME", "a-1"), ("HOSTNAME", "x"), ("POD_NAMESPACE", "shop"), ("POD_IP", "10.0.0.1")];
        let wanted = read("--lease a --run 3 --standby", &pod).unwrap().unwrap();
        assert_eq!(wanted.name, LeaseName { namespace: Some("shop".into()), name: "a".into() });
        assert_eq!(wanted.rhythm, Rhythm::STANDBY);
        let http = "10.0.0.1:8080".to_owned();
        let candidate = Candidate { identity: "a-1".into(), run: 3, http, parallelism: 2 };
        assert_eq!(wanted.candidate(Some(8080), 2), candidate);
        assert_eq!(wanted.candidate(None, 2).http, "");

        let wanted = read("--lease a --run 3", &[("POD_NAME", " "), ("HOSTNAME", "x"), ("POD_IP", "fd00::1")]);
        let wanted = wanted.unwrap().unwrap();
        assert_eq!((wanted.name.namespace.as_ref(), wanted.rhythm), (None, Rhythm::ALONE));
        assert_eq!(wanted.candidate(Some(80), 2).identity, "x");
        assert_eq!(wanted.candidate(Some(80), 2).http, "[fd00::1]:80");
        assert_eq!(read("", &pod), Ok(None));
    }

    #[test]
    fn half_of_it_is_refused() {
        for (words, says) in [
            ("--lease a", "--run <N>"),
            ("--run 1", "--lease <NAME>"),
            ("--standby", "--lease <NAME>"),
            ("--lease a --run 0", "0 is not in 1.."),
            ("--lease a --run 1 --standby-lock /x", "cannot be used with"),
        ] {
            let error = args(words).unwrap_err();
            assert!(error.contains(says), "{words}: {error}");
        }
        let error = read("--lease a --run 1", &[("POD_IP", "here")]).unwrap_err();
        assert!(error.starts_with("the variable POD_IP is 'here'"), "{error}");
    }
}
