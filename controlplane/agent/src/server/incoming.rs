//! Connections, at most so many at once. Those whose caller was let in once are
//! kept; of the others the oldest makes room for a new one, so that whoever only
//! holds connections open keeps nobody out.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::Stream;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tonic::transport::server::Connected;
use tracing::{debug, warn};

/// Most connections at once; more wait to be served.
pub(super) const CONNECTIONS_LIMIT: usize = 1024;
/// How long, and for how many bytes, a connection that was not let in is read
/// after its end.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: u64 = 64 * 1024;
/// Pause after a failed accept, which is most often the lack of descriptors.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(200);

/// The listener's connections, at most `limit` at once; never ends, never fails.
pub(super) fn connections(listener: TcpListener, limit: usize) -> impl Stream<Item = io::Result<Connection>> {
    let guests = (Arc::new(Semaphore::new(limit)), Arc::new(Strangers::default()));
    futures::stream::unfold((listener, guests), |(listener, (permits, strangers))| async move {
        let stream = accept(&listener).await;
        let permit = match Arc::clone(&permits).try_acquire_owned() {
            Ok(permit) => permit,
            Err(_) => {
                strangers.end_oldest();
                Arc::clone(&permits).acquire_owned().await.expect("this semaphore is never closed")
            }
        };
        let connection = Connection::new(stream, &strangers, permit);
        Some((Ok(connection), (listener, (permits, strangers))))
    })
}

async fn accept(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                // Only its latency suffers when it is refused.
                let _ = stream.set_nodelay(true);
                return stream;
            }
            Err(error) => {
                warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_BACKOFF).await;
            }
        }
    }
}

/// The connections whose caller has not been let in, the oldest first.
#[derive(Debug, Default)]
struct Strangers {
    waiting: Mutex<Vec<Stranger>>,
    numbers: AtomicU64,
}

#[derive(Debug)]
struct Stranger {
    number: u64,
    end: oneshot::Sender<()>,
}

impl Strangers {
    fn end_oldest(&self) {
        let mut waiting = self.waiting();
        if waiting.is_empty() {
            warn!("every connection is in use; the next waits");
        } else {
            debug!("a connection whose caller was never let in makes room for another");
            // It fails only when the connection ends by itself at this moment.
            let _ = waiting.remove(0).end.send(());
        }
    }

    fn forget(&self, number: u64) {
        self.waiting().retain(|stranger| stranger.number != number);
    }

    fn waiting(&self) -> MutexGuard<'_, Vec<Stranger>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The connection that a request came by; in the extensions of every request.
#[derive(Clone, Debug)]
pub(crate) struct Origin {
    number: u64,
    strangers: Arc<Strangers>,
    let_in: Arc<AtomicBool>,
}

impl Origin {
    /// Its caller may call something: the connection is kept from now on.
    pub(crate) fn let_in(&self) {
        if !self.let_in.swap(true, Ordering::Relaxed) {
            self.strangers.forget(self.number);
        }
    }
}

/// A connection that counts as one while it lives.
#[derive(Debug)]
pub(super) struct Connection {
    /// `None` only while it is dropped.
    stream: Option<TcpStream>,
    origin: Origin,
    /// Heard when another needs the place; closed when the caller was let in.
    end: Option<oneshot::Receiver<()>>,
    permit: Option<OwnedSemaphorePermit>,
}

impl Connection {
    fn new(stream: TcpStream, strangers: &Arc<Strangers>, permit: OwnedSemaphorePermit) -> Self {
        let number = strangers.numbers.fetch_add(1, Ordering::Relaxed);
        let (end, ended) = oneshot::channel();
        strangers.waiting().push(Stranger { number, end });
        let origin = Origin { number, strangers: Arc::clone(strangers), let_in: Arc::default() };
        Self { stream: Some(stream), origin, end: Some(ended), permit: Some(permit) }
    }

    fn stream(&mut self) -> &mut TcpStream {
        self.stream.as_mut().expect("a connection that is in use has its stream")
    }

    fn check_end(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let Some(end) = &mut self.end else { return Ok(()) };
        match Pin::new(end).poll(cx) {
            Poll::Pending => Ok(()),
            Poll::Ready(Ok(())) => {
                // Its place is needed now.
                self.permit = None;
                Err(io::ErrorKind::ConnectionAborted.into())
            }
            Poll::Ready(Err(_)) => {
                self.end = None;
                Ok(())
            }
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.origin.strangers.forget(self.origin.number);
        let was_let_in = self.origin.let_in.load(Ordering::Relaxed);
        let lingering = self.stream.take().zip(self.permit.take()).filter(|_| !was_let_in);
        if let (Some((stream, permit)), Ok(runtime)) = (lingering, tokio::runtime::Handle::try_current()) {
            runtime.spawn(async move {
                // Whatever becomes of it.
                let _ = tokio::time::timeout(LINGER, say_last(stream)).await;
                drop(permit);
            });
        }
    }
}

/// Ends a connection so that its caller can still read why: a close with unread
/// bytes would reset it, and take back the alert that names the certificate.
async fn say_last(mut stream: TcpStream) -> io::Result<()> {
    stream.shutdown().await?;
    tokio::io::copy(&mut stream.take(LINGER_BYTES), &mut tokio::io::sink()).await?;
    Ok(())
}

impl Connected for Connection {
    type ConnectInfo = Origin;

    fn connect_info(&self) -> Origin {
        self.origin.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check_end(cx)?;
        Pin::new(self.stream()).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.check_end(cx)?;
        Pin::new(self.stream()).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check_end(cx)?;
        Pin::new(self.stream()).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.as_ref().is_some_and(TcpStream::is_write_vectored)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self.stream()).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self.stream()).poll_shutdown(cx)
    }
}
