//! The connections: accepted, watched, and closed when the server ends.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::guarded::Guarded;
use crate::routes::routes;
use crate::state::App;

/// Time for answers to say that they were stopped.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Serves until `shutdown`, then gives running answers their time.
pub(crate) async fn serve(listener: TcpListener, app: App, shutdown: impl Future<Output = ()>) {
    let router = routes(app.clone());
    let places = Arc::new(Semaphore::new(app.settings.max_connections.max(1)));
    let (closing, closed) = watch::channel(false);
    let mut connections = JoinSet::new();
    tokio::pin!(shutdown);
    loop {
        tokio::select! {
            biased; // the signals are watched before anything is answered
            () = &mut shutdown => break,
            Ok((stream, place)) = accept(&listener, &places) => {
                let patience = app.settings.patience;
                connections.spawn(connection(stream, place, router.clone(), patience, closed.clone()));
            }
            Some(_) = connections.join_next() => {}
        }
    }
    drop(listener);
    closing.send_replace(true);
    if timeout(app.settings.grace, all(&mut connections))
        .await
        .is_err()
    {
        app.end();
        let _ = timeout(LAST_WORDS, all(&mut connections)).await;
    }
    app.end();
    connections.shutdown().await;
}

async fn all(connections: &mut JoinSet<()>) {
    while connections.join_next().await.is_some() {}
}

/// The next connection, once there is room for it.
async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> io::Result<(TcpStream, OwnedSemaphorePermit)> {
    let place = places.clone().acquire_owned().await;
    let place = place.map_err(io::Error::other)?;
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return Ok((stream, place)),
            Err(error) => {
                // The client has gone, or this process has too many files open: that passes.
                tracing::warn!(%error, "a connection cannot be accepted");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn until(mut flag: watch::Receiver<bool>) {
    let _ = flag.wait_for(|&flag| flag).await;
}

/// One connection, to its end or to that of the server.
async fn connection(
    stream: TcpStream,
    _place: OwnedSemaphorePermit,
    router: Router,
    patience: Duration,
    closed: watch::Receiver<bool>,
) {
    // A token must not wait for the next one.
    let _ = stream.set_nodelay(true);
    let stream = Guarded::new(stream, patience);
    let has_read = stream.has_read();
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(patience)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    tokio::pin!(connection);
    let outcome = tokio::select! {
        outcome = &mut connection => outcome,
        () = until(closed) => {
            if !has_read.load(Ordering::Relaxed) {
                return; // opened ahead of need, as browsers do
            }
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = outcome {
        tracing::debug!(%error, "a connection ended early");
    }
}
