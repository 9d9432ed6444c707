//! The command `healthcheck`: asks `/readyz` of the instance beside it, for images without a shell.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use crate::clock::Stopwatch;

/// For the whole exchange. Shorter than the time-out of Docker's HEALTHCHECK, so that the reason
/// gets said.
const TIME_OUT: Duration = Duration::from_secs(2);
/// "HTTP/1.1 200": all that is read of the answer.
const STATUS_BYTES: usize = 12;

/// # Errors
/// Why the instance is not ready, for people.
pub fn run(ops: SocketAddr) -> Result<(), String> {
    run_within(ops, TIME_OUT)
}

fn run_within(ops: SocketAddr, time_out: Duration) -> Result<(), String> {
    let status = ask(ops, time_out).map_err(|error| format!("{ops} does not answer: {error}"))?;
    match status.split_once(' ') {
        Some(("HTTP/1.1" | "HTTP/1.0", "200")) => Ok(()),
        _ => Err(format!("{ops} is not ready: {}", status.escape_debug())),
    }
}

fn ask(ops: SocketAddr, time_out: Duration) -> io::Result<String> {
    let watch = Stopwatch::start();
    let left = || match time_out.saturating_sub(watch.elapsed()) {
        Duration::ZERO => Err(io::ErrorKind::TimedOut.into()),
        left => Ok::<_, io::Error>(left),
    };
    let mut stream = TcpStream::connect_timeout(&ops, time_out)?;
    stream.set_write_timeout(Some(left()?))?;
    let request = format!("GET /readyz HTTP/1.1\r\nHost: {ops}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let mut status = [0; STATUS_BYTES];
    let mut read = 0;
    while read < STATUS_BYTES {
        // Set anew each time: a server that drips bytes must not outlast the whole.
        stream.set_read_timeout(Some(left()?))?;
        match stream.read(&mut status[read..])? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => read += n,
        }
    }
    Ok(String::from_utf8_lossy(&status).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::thread;

    const SHORT: Duration = Duration::from_millis(500);

    /// Serves one connection with `answer` (one write a part) and returns what the client got.
    fn answered(parts: &'static [&'static str]) -> Result<(), String> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let ops = listener.local_addr().unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 1024];
            let n = stream.read(&mut request).unwrap();
            for part in parts {
                let _client_gone = stream.write_all(part.as_bytes());
                thread::sleep(Duration::from_millis(50));
            }
            String::from_utf8_lossy(&request[..n]).into_owned()
        });
        let result = run_within(ops, SHORT);
        assert!(server.join().unwrap().starts_with("GET /readyz HTTP/1.1\r\n"));
        result
    }

    #[test]
    fn ready_is_200_and_nothing_else() {
        assert_eq!(answered(&["HTTP/1.1 200 OK\r\n\r\n"]), Ok(()));
        assert_eq!(answered(&["HTTP/1.1 ", "200 OK\r\n\r\n"]), Ok(()));
        let not_ready = answered(&["HTTP/1.1 503 Service Unavailable\r\n\r\n"]);
        assert!(not_ready.unwrap_err().contains("503"));
        assert!(answered(&["SSH-2.0-OpenSSH_9.9\r\n"]).is_err());
        assert!(answered(&["HTTP"]).is_err());
    }

    #[test]
    fn nobody_there_is_not_ready() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let ops = listener.local_addr().unwrap();
        drop(listener);
        assert!(run(ops).is_err());
    }

    #[test]
    fn one_who_never_answers_is_not_ready_in_time() {
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let watch = Stopwatch::start();
        assert!(run_within(silent.local_addr().unwrap(), SHORT).is_err());
        assert!(watch.elapsed() >= SHORT);
        assert!(watch.elapsed() < SHORT * 10);
    }

    #[test]
    fn one_who_drips_is_not_ready_in_time() {
        let drips = answered(&["H", "T", "T", "P", "/", "1", ".", "1", " ", "2", "0", "0"]);
        assert!(drips.is_err(), "12 bytes 50 ms apart are more than {SHORT:?}");
    }
}
