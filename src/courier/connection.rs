//! A connection that can be given up: it takes no further request, and ends when those under way have
//! had their time.
//!
//! HTTP/1.1 ends a connection with its request. HTTP/2 does not, and a receiver that answers nothing but
//! keeps the connection well would hold it for ever.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use atomic_waker::AtomicWaker;
use http::Extensions;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::client::legacy::connect::{CaptureConnection, Connected, Connection};
use tokio::time::Sleep;

use crate::clock::Stopwatch;

/// How long a connection serves.
#[derive(Clone, Copy)]
pub struct Life {
    /// Whoever looks at a connection older than this gives it up: a receiver that moves is found again.
    pub age_max: Duration,
    /// How long what is under way may take when the connection is given up.
    pub grace: Duration,
}

/// What an attempt knows of the connection that it took.
struct Handle {
    age: Stopwatch,
    age_max: Duration,
    given_up: AtomicBool,
    /// Of whoever moves the connection.
    mover: AtomicWaker,
}

/// To be called when an attempt is over.
pub fn after_use(taken: &CaptureConnection, timed_out: bool) {
    let connected = taken.connection_metadata();
    let Some(connected) = connected.as_ref() else { return };
    let mut extras = Extensions::new();
    connected.get_extras(&mut extras);
    let Some(handle) = extras.get::<Arc<Handle>>() else { return };
    if timed_out || handle.age.elapsed() > handle.age_max {
        connected.poison();
        handle.given_up.store(true, Ordering::Release);
        handle.mover.wake();
    }
}

pub struct Disposable<T> {
    stream: T,
    handle: Arc<Handle>,
    grace: Duration,
    /// Set when it is.
    end: Option<Pin<Box<Sleep>>>,
}

impl<T> Disposable<T> {
    pub fn new(stream: T, Life { age_max, grace }: Life) -> Self {
        let (age, given_up) = (Stopwatch::start(), AtomicBool::new(false));
        let handle = Arc::new(Handle { age, age_max, given_up, mover: AtomicWaker::new() });
        Self { stream, handle, grace, end: None }
    }
}

impl<T: Unpin> Disposable<T> {
    /// The stream, until the end. Whoever is told to wait is also woken at the end.
    fn alive(&mut self, cx: &mut Context<'_>) -> io::Result<Pin<&mut T>> {
        if self.end.is_none() {
            // Before the look: who gives it up in between wakes us.
            self.handle.mover.register(cx.waker());
            if self.handle.given_up.load(Ordering::Acquire) {
                self.end = Some(Box::pin(tokio::time::sleep(self.grace)));
            }
        }
        if let Some(end) = &mut self.end
            && end.as_mut().poll(cx).is_ready()
        {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(Pin::new(&mut self.stream))
    }
}

impl<T: Connection> Connection for Disposable<T> {
    fn connected(&self) -> Connected {
        // Extras are copied into every response: no more than is asked for.
        let connected = match self.stream.connected().is_negotiated_h2() {
            true => Connected::new().negotiated_h2(),
            false => Connected::new(),
        };
        connected.extra(Arc::clone(&self.handle))
    }
}

impl<T: Read + Unpin> Read for Disposable<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        self.get_mut().alive(cx)?.poll_read(cx, buf)
    }
}

impl<T: Write + Unpin> Write for Disposable<T> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.get_mut().alive(cx)?.poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().alive(cx)?.poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().alive(cx)?.poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.get_mut().alive(cx)?.poll_write_vectored(cx, bufs)
    }
}
