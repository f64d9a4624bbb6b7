//! A real S3 server: versitygw over a folder.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use tempfile::TempDir;

use crate::{
    Stop,
    process::{Server, cached, free_port},
    scratch,
};

const BUCKET: &str = "floodmark";
const STARTS_MAX: u32 = 3;

/// An S3 server with one empty bucket. Ends, with all it holds, when dropped.
pub struct S3 {
    server: Server,
    folder: TempDir,
    address: SocketAddr,
    access_key: String,
    secret: String,
}

impl S3 {
    /// Starts a server on a free port, with keys that nobody else knows.
    ///
    /// # Errors
    /// When `setup.sh` has not run, or the server doesn't start.
    pub fn start() -> Result<Self> {
        Self::start_at(Ipv4Addr::LOCALHOST.into())
    }

    /// The same at an address of this machine.
    ///
    /// # Errors
    /// See there.
    pub fn start_at(host: IpAddr) -> Result<Self> {
        let folder = scratch::folder("s3-")?;
        for path in [folder.path().join("data").join(BUCKET), folder.path().join("sidecar")] {
            std::fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
        }
        let (access_key, secret) = (ulid::Ulid::generate().to_string(), ulid::Ulid::generate().to_string());
        let mut tries = 0;
        loop {
            let address = SocketAddr::new(host, free_port(host)?);
            tries += 1;
            match launch(folder.path(), address, &access_key, &secret) {
                Ok(server) => return Ok(Self { server, folder, address, access_key, secret }),
                // Somebody may have taken the port meanwhile.
                Err(_) if tries < STARTS_MAX => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Ends the server and starts it again on the same port, with the same data and keys.
    ///
    /// # Errors
    /// When it doesn't end, or doesn't start again.
    pub fn restart(&mut self, how: Stop) -> Result<()> {
        self.server.stop(how)?;
        self.server = launch(self.folder.path(), self.address, &self.access_key, &self.secret)?;
        Ok(())
    }

    /// Stops it in its tracks: connections stay, and nothing is answered until [`S3::resume`].
    ///
    /// # Errors
    /// When it has ended.
    pub fn stall(&self) -> Result<()> {
        self.server.signal(Signal::SIGSTOP)
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// When it has ended.
    pub fn resume(&self) -> Result<()> {
        self.server.signal(Signal::SIGCONT)
    }

    /// `http://…`: its address.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The bucket's name.
    #[must_use]
    pub fn bucket(&self) -> &'static str {
        BUCKET
    }

    /// The access key's id.
    #[must_use]
    pub fn access_key(&self) -> &str {
        &self.access_key
    }

    /// The access key's secret.
    #[must_use]
    pub fn secret(&self) -> &str {
        &self.secret
    }

    /// The environment with which a program finds this server.
    #[must_use]
    pub fn env(&self) -> Vec<(&'static str, String)> {
        vec![
            ("AWS_ENDPOINT_URL", self.endpoint()),
            ("AWS_ALLOW_HTTP", "true".to_owned()),
            ("AWS_REGION", "us-east-1".to_owned()),
            ("AWS_ACCESS_KEY_ID", self.access_key.clone()),
            ("AWS_SECRET_ACCESS_KEY", self.secret.clone()),
        ]
    }

    /// The folder that holds the bucket's objects as files: for tests that damage one.
    #[must_use]
    pub fn objects(&self) -> PathBuf {
        self.folder.path().join("data").join(BUCKET)
    }
}

fn launch(folder: &Path, address: SocketAddr, access_key: &str, secret: &str) -> Result<Server> {
    let mut command = Command::new(cached("versitygw")?);
    command
        // By the environment: the command line is there for all to see.
        .env("ROOT_ACCESS_KEY", access_key)
        .env("ROOT_SECRET_KEY", secret)
        .args(["--port", &address.to_string(), "--region", "us-east-1", "--quiet", "posix"])
        // Metadata beside the data: not every file system for temporary files has extended attributes.
        .arg("--sidecar")
        .arg(folder.join("sidecar"))
        .arg(folder.join("data"));
    Server::start(command, folder, || TcpStream::connect(address).is_ok())
}
