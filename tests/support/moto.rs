//! moto, an AWS in Python, as a process of its own; gone when it is dropped.
//!
//! It needs `PAYMENT_SIM_VENV`, a venv with moto[server,events,sqs] and boto3.

#![allow(dead_code, reason = "each test takes what it needs")]

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use payment_sim::clock::Stopwatch;

const READY_WITHIN: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(50);
/// Another process may take a free port before moto does.
const PORTS_TRIED: usize = 3;

pub struct Moto {
    process: Child,
    addr: SocketAddr,
}

impl Drop for Moto {
    fn drop(&mut self) {
        self.process.kill().expect("it is our child, and not waited for yet");
        self.process.wait().expect("a killed child can be waited for");
    }
}

impl Moto {
    pub fn start(venv: &str) -> Self {
        (0..PORTS_TRIED).find_map(|_| Self::try_start(venv)).expect("moto came up on no port")
    }

    fn try_start(venv: &str) -> Option<Self> {
        let addr = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let process = Command::new(format!("{venv}/bin/moto_server"))
            .args(["-H", "127.0.0.1", "-p", &addr.port().to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut moto = Self { process, addr };
        let watch = Stopwatch::start();
        while watch.elapsed() < READY_WITHIN {
            if moto.is_ready() {
                return Some(moto);
            }
            if moto.process.try_wait().unwrap().is_some() {
                return None;
            }
            thread::sleep(POLL);
        }
        None
    }

    /// Asks for a page that only moto has: the port alone could be anyone's.
    fn is_ready(&self) -> bool {
        let Ok(mut stream) = TcpStream::connect_timeout(&self.addr, POLL) else { return false };
        stream.set_read_timeout(Some(READY_WITHIN)).unwrap();
        let asked = stream.write_all(b"GET /moto-api/ HTTP/1.0\r\n\r\n");
        let mut page = String::new();
        asked.is_ok() && stream.read_to_string(&mut page).is_ok() && page.contains(" 200 ")
    }

    pub fn endpoint(&self) -> String {
        format!("http://{}", self.addr)
    }
}

/// Where moto is installed. Without it a test is skipped, in one line that is seen; in CI it fails.
#[expect(
    clippy::disallowed_methods,
    reason = "a test that needs an interpreter is told so by its caller, and says what it skips"
)]
pub fn venv() -> Option<String> {
    let venv = std::env::var("PAYMENT_SIM_VENV").ok();
    let is_ci = std::env::var("CI").is_ok_and(|ci| ci == "true");
    assert!(venv.is_some() || !is_ci, "PAYMENT_SIM_VENV is not set, and CI skips nothing");
    if venv.is_none() {
        // Past the capture of a passing test's output.
        let line = b"skipped: PAYMENT_SIM_VENV names no venv with moto\n";
        std::io::stderr().write_all(line).unwrap();
    }
    venv
}
