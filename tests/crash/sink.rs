//! Where webhooks arrive, and events on standard output. Each is in the journal before it counts as taken.

use std::{
    io::{BufRead, BufReader},
    process::ChildStdout,
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread::JoinHandle,
    time::Duration,
};

use crate::{
    arrival::{Arrival, Carrier, Envelope, Received},
    journal::Journal,
    support::{
        chance::Chance,
        free_ports,
        receiver::{Answers, Receiver},
    },
};

/// Whoever asks there is answered 410: such a webhook is dead at once.
const GONE_PATH: &str = "/gone";

pub struct Sink {
    journal: Arc<Journal>,
    receiver: Receiver,
    /// Where nobody ever listens.
    nobody: u16,
    gate: Arc<Gate>,
}

impl Sink {
    pub async fn start(journal: Arc<Journal>, chance: Chance) -> Self {
        let receiver = Receiver::start(answers(Arc::clone(&journal), chance)).await;
        let [nobody] = free_ports();
        Self { journal, receiver, nobody, gate: Arc::default() }
    }

    /// The URLs that payments are made with, as often as each stands here. Empty: no webhook.
    pub fn urls(&self) -> Vec<String> {
        let gone = format!("http://127.0.0.1:{}{GONE_PATH}", self.receiver.port);
        let nobody = format!("http://127.0.0.1:{}/", self.nobody);
        let mut urls = vec![self.receiver.url(); 10];
        urls.extend(vec![String::new(); 8]);
        urls.extend([gone, nobody]);
        urls
    }

    /// Reads events until the service's end of the pipe is closed.
    pub fn follow(&self, stdout: ChildStdout) -> JoinHandle<()> {
        let (journal, gate) = (Arc::clone(&self.journal), Arc::clone(&self.gate));
        std::thread::spawn(move || read_events(stdout, &journal, &gate))
    }

    /// Webhooks find nobody, and nobody reads events.
    pub async fn die(&self) {
        self.gate.set(true);
        self.receiver.set_open(false).await;
    }

    pub async fn revive(&self) {
        self.receiver.set_open(true).await;
        self.gate.set(false);
    }
}

/// Mostly 200; sometimes an error, sometimes late, sometimes taken and yet not answered.
fn answers(journal: Arc<Journal>, chance: Chance) -> Answers {
    let chance = Arc::new(Mutex::new(chance));
    Arc::new(move |request| {
        let drawn = chance.lock().unwrap_or_else(PoisonError::into_inner).below(100);
        let journal = Arc::clone(&journal);
        Box::pin(async move {
            let is_gone = request.uri().path() == GONE_PATH;
            let (answer, wait_ms) = match drawn {
                _ if is_gone => (Some(410), 0),
                0..5 => (Some(500), 0),
                5..8 => (None, 0),
                8..12 => (Some(200), drawn * 20),
                _ => (Some(200), 0),
            };
            let name = request.headers().get("webhook-id").and_then(|id| id.to_str().ok());
            let (id, body) = (name.unwrap_or_default().to_owned(), request.body());
            tokio::time::sleep(Duration::from_millis(wait_ms)).await;
            let (carrier, letter) = (Carrier::Webhook, None);
            let received = Received { carrier, id, whole: body, body, answer, letter };
            journal.write(&Arrival::of(received)).await;
            answer
        })
    })
}

fn read_events(stdout: ChildStdout, journal: &Journal, gate: &Gate) {
    let mut reader = BufReader::new(stdout);
    let mut line = Vec::new();
    loop {
        gate.pass();
        line.clear();
        let read = reader.read_until(b'\n', &mut line).expect("a pipe can be read");
        // A line that the kill cut off was not published: it is still owed.
        if read == 0 || line.last() != Some(&b'\n') {
            return;
        }
        journal.note(&of_line(&line).unwrap_or_else(|| Arrival::unreadable(&line)));
    }
}

fn of_line(line: &[u8]) -> Option<Arrival> {
    let event: Envelope<'_> = serde_json::from_slice(line).ok()?;
    Some(Arrival::of(Received {
        carrier: Carrier::Stdout,
        id: event.id,
        whole: line,
        body: event.detail.get().as_bytes(),
        answer: Some(200),
        letter: None,
    }))
}

/// Holds up the reader of events.
#[derive(Default)]
struct Gate {
    is_shut: Mutex<bool>,
    changed: Condvar,
}

impl Gate {
    fn set(&self, shut: bool) {
        *self.is_shut.lock().unwrap_or_else(PoisonError::into_inner) = shut;
        self.changed.notify_all();
    }

    fn pass(&self) {
        let is_shut = self.is_shut.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.changed.wait_while(is_shut, |shut| *shut));
    }
}
