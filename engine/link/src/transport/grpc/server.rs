//! The end that listens: one server for control and exchange.
//!
//! Handshakes run beside each other and are bounded in number and time, so nobody who connects and says nothing keeps others
//! out. Closing ends every stream that others opened, with a word why.

use std::{
    io,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use arrow_flight::{
    Action, ActionType, Criteria, Empty, FlightData, FlightDescriptor, FlightInfo, HandshakeRequest, HandshakeResponse,
    PollInfo, PutResult, SchemaResult, Ticket,
    flight_service_server::{FlightService, FlightServiceServer},
};
use async_trait::async_trait;
use floodmark_snapshot::{Env, Error, Result};
use futures::{
    FutureExt, SinkExt, Stream, StreamExt,
    channel::mpsc,
    future::{BoxFuture, Either, select},
    stream::{self, BoxStream},
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
};
use tonic::{Request, Response, Status, Streaming, transport::Server};

use super::{
    CONNECTION_WINDOW, HTTP_FRAME_BYTES, Handshake, MESSAGE_BYTES_MAX, OnRefused, PACKETS_WAITING_MAX, STREAM_WINDOW,
    STREAMS_MAX, Settings, codec, ended, error_of,
    secure::{Accepted, Origin},
    status_of, within,
};
use crate::transport::{Acceptor, Endpoint, Incoming, Listening, Outgoing, Packet, Peer, Pipe};

/// Handshakes that run at a time; further connections wait in the kernel.
const HANDSHAKES_MAX: usize = 64;
/// Connections that wait for tonic.
const ACCEPTED_MAX: usize = 16;
/// How long to wait after the system could not give a connection out.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);
/// How long streams may take to end when the server closes.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

pub(super) struct GrpcListening {
    env: Env,
    endpoint: Endpoint,
    closing: watch::Sender<bool>,
    closed: watch::Receiver<bool>,
}

pub(super) async fn listen(
    env: &Env,
    at: &Endpoint,
    handshake: Arc<dyn Handshake>,
    acceptor: Arc<dyn Acceptor>,
    settings: Settings,
    on_refused: OnRefused,
) -> Result<GrpcListening> {
    let failed = |e: io::Error| Error::abort(format!("listen at {at}: {e}"));
    let listener = TcpListener::bind(&at.0).await.map_err(failed)?;
    let endpoint = Endpoint(listener.local_addr().map_err(failed)?.to_string());
    let (closing, close) = watch::channel(false);
    let (connections, accepted) = mpsc::channel::<io::Result<Accepted>>(ACCEPTED_MAX);
    let door = Door { env: env.clone(), handshake, settings, on_refused, connections };
    env.runtime.spawn(door.keep(listener, close.clone()).boxed());

    let service = FlightServiceServer::new(Service { env: env.clone(), acceptor, settings, close: close.clone() })
        .max_decoding_message_size(MESSAGE_BYTES_MAX);
    let (done, closed) = watch::channel(false);
    let serve = Server::builder()
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(HTTP_FRAME_BYTES)
        .max_concurrent_streams(STREAMS_MAX)
        .http2_keepalive_interval(Some(settings.ping_interval))
        .http2_keepalive_timeout(Some(settings.ping_timeout))
        .add_service(service)
        .serve_with_incoming_shutdown(accepted, is_set(close));
    env.runtime.spawn(
        async move {
            if let Err(error) = serve.await {
                tracing::error!(%error, "the server has failed");
            }
            done.send_replace(true);
        }
        .boxed(),
    );
    Ok(GrpcListening { env: env.clone(), endpoint, closing, closed })
}

/// Completes when the flag is set, or nobody can set it any more.
async fn is_set(mut flag: watch::Receiver<bool>) {
    drop(flag.wait_for(|set| *set).await);
}

#[async_trait]
impl Listening for GrpcListening {
    fn endpoint(&self) -> Endpoint {
        self.endpoint.clone()
    }

    async fn close(&self) {
        self.closing.send_replace(true);
        // A peer that does not answer can't keep the process.
        let closed = is_set(self.closed.clone()).map(Ok);
        drop(within(&self.env, CLOSE_TIMEOUT, "close", closed).await);
    }
}

/// Lets connections in.
#[derive(Clone)]
struct Door {
    env: Env,
    handshake: Arc<dyn Handshake>,
    settings: Settings,
    on_refused: OnRefused,
    connections: mpsc::Sender<io::Result<Accepted>>,
}

impl Door {
    async fn keep(self, listener: TcpListener, close: watch::Receiver<bool>) {
        let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
        let mut closing = pin!(is_set(close));
        loop {
            let next = async {
                let permit = handshakes.clone().acquire_owned().await;
                (permit, listener.accept().await)
            };
            match select(pin!(next), closing.as_mut()).await {
                Either::Left(((Ok(permit), Ok((stream, from))), _)) => {
                    let door = self.clone();
                    self.env.runtime.spawn(
                        async move {
                            door.let_in(stream, from).await;
                            drop(permit);
                        }
                        .boxed(),
                    );
                }
                Either::Left(((_, refused), _)) => {
                    if let Err(error) = refused {
                        tracing::warn!(%error, "could not accept a connection");
                    }
                    self.env.runtime.sleep(ACCEPT_RETRY).await;
                }
                Either::Right(_) => return,
            }
        }
    }

    async fn let_in(mut self, stream: TcpStream, address: SocketAddr) {
        let shaken = async {
            stream.set_nodelay(true).map_err(|e| Error::retry(e.to_string()))?;
            self.handshake.accept(stream).await
        };
        match within(&self.env, self.settings.connect_timeout, "finish the TLS handshake", shaken).await {
            // The server may have gone meanwhile.
            Ok((io, subject)) => {
                drop(self.connections.send(Ok(Accepted { io, from: Origin { subject, address } })).await);
            }
            Err(error) => (self.on_refused)(&address.to_string(), &error),
        }
    }
}

struct Service {
    env: Env,
    acceptor: Arc<dyn Acceptor>,
    settings: Settings,
    close: watch::Receiver<bool>,
}

fn closing() -> Error {
    Error::retry("the process is shutting down")
}

impl Service {
    /// Reads what a stream is for, and hands it over.
    async fn accept(&self, request: Request<Streaming<FlightData>>) -> Result<Answers> {
        let Some(Origin { subject, address }) = request.extensions().get::<Origin>().cloned() else {
            return Err(Error::abort("internal error: a stream comes from nowhere"));
        };
        let mut packets = request.into_inner();
        let first = async { packets.message().await.map_err(|s| error_of(&s)) };
        let first = within(&self.env, self.settings.open_timeout, "read what a stream is for", first).await?;
        let opening =
            first.and_then(codec::opening).ok_or_else(|| Error::abort("a stream does not say what it is for"))?;
        let (outgoing, answers) = mpsc::channel(PACKETS_WAITING_MAX);
        let shut_down = stream::once(is_set(self.close.clone())).map(|()| Err(closing()));
        let packets = packets.map(|r| r.map(codec::packet).map_err(|s| error_of(&s)));
        let incoming = ended_by(packets, shut_down);
        let peer = Peer { subject, address: address.to_string() };
        self.acceptor.accept(peer, opening, Pipe { outgoing: Box::new(ServerEnd(outgoing)), incoming })?;
        Ok(Answers::new(answers, self.close.clone()))
    }
}

/// The stream, up to its own end or to the other's first item, whatever comes first.
fn ended_by<S, E>(packets: S, end: E) -> Incoming
where
    S: Stream<Item = Result<Packet>> + Send + 'static,
    E: Stream<Item = Result<Packet>> + Send + 'static,
{
    // The end of the packets must end the whole, though the other stream goes on.
    let packets = packets.map(Some).chain(stream::once(async { None }));
    let mut over = false;
    stream::select(packets, end.map(Some))
        .take_while(move |item| {
            let go_on = item.is_some() && !over;
            over |= matches!(item, Some(Err(_)));
            std::future::ready(go_on)
        })
        .filter_map(std::future::ready)
        .boxed()
}

/// What goes back on a stream that others opened.
struct Answers {
    packets: mpsc::Receiver<Packet>,
    close: watch::Receiver<bool>,
    /// `None` when it has been said.
    closing: Option<BoxFuture<'static, ()>>,
}

impl Answers {
    fn new(packets: mpsc::Receiver<Packet>, close: watch::Receiver<bool>) -> Self {
        Self { packets, closing: Some(is_set(close.clone()).boxed()), close }
    }
}

impl Stream for Answers {
    type Item = Result<FlightData, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some(closing_now) = &mut self.closing else { return Poll::Ready(None) };
        if closing_now.poll_unpin(context).is_pending() {
            let packet = ready!(self.packets.poll_next_unpin(context));
            // Those who wait for the flag are told one after the other: whoever ended the packets may have been told first.
            if packet.is_some() || !*self.close.borrow() {
                return Poll::Ready(packet.map(|packet| Ok(codec::flight_data(packet))));
            }
        }
        self.closing = None;
        Poll::Ready(Some(Err(status_of(&closing()))))
    }
}

/// At the end that accepted a stream.
struct ServerEnd(mpsc::Sender<Packet>);

impl Outgoing for ServerEnd {
    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(ready!(self.0.poll_ready(context)).map_err(|_| ended()))
    }

    fn send(&mut self, packet: Packet) -> Result<()> {
        self.0.start_send(packet).map_err(|_| ended())
    }
}

type Answer<T> = Result<Response<T>, Status>;
type Nothing<T> = BoxStream<'static, Result<T, Status>>;

fn not_here<T>() -> Answer<T> {
    Err(Status::unimplemented("only DoExchange is spoken here"))
}

#[async_trait]
impl FlightService for Service {
    type HandshakeStream = Nothing<HandshakeResponse>;
    type ListFlightsStream = Nothing<FlightInfo>;
    type DoGetStream = Nothing<FlightData>;
    type DoPutStream = Nothing<PutResult>;
    type DoExchangeStream = Nothing<FlightData>;
    type DoActionStream = Nothing<arrow_flight::Result>;
    type ListActionsStream = Nothing<ActionType>;

    async fn do_exchange(&self, request: Request<Streaming<FlightData>>) -> Answer<Self::DoExchangeStream> {
        let answers = self.accept(request).await.map_err(|e| status_of(&e))?;
        Ok(Response::new(answers.boxed()))
    }

    async fn handshake(&self, _: Request<Streaming<HandshakeRequest>>) -> Answer<Self::HandshakeStream> {
        not_here()
    }

    async fn list_flights(&self, _: Request<Criteria>) -> Answer<Self::ListFlightsStream> {
        not_here()
    }

    async fn get_flight_info(&self, _: Request<FlightDescriptor>) -> Answer<FlightInfo> {
        not_here()
    }

    async fn poll_flight_info(&self, _: Request<FlightDescriptor>) -> Answer<PollInfo> {
        not_here()
    }

    async fn get_schema(&self, _: Request<FlightDescriptor>) -> Answer<SchemaResult> {
        not_here()
    }

    async fn do_get(&self, _: Request<Ticket>) -> Answer<Self::DoGetStream> {
        not_here()
    }

    async fn do_put(&self, _: Request<Streaming<FlightData>>) -> Answer<Self::DoPutStream> {
        not_here()
    }

    async fn do_action(&self, _: Request<Action>) -> Answer<Self::DoActionStream> {
        not_here()
    }

    async fn list_actions(&self, _: Request<Empty>) -> Answer<Self::ListActionsStream> {
        not_here()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn whoever_learns_of_the_closing_first_can_not_end_a_stream_without_a_word() {
        let (close, closed) = watch::channel(false);
        let (packets, answers) = mpsc::channel(1);
        let mut answers = Answers::new(answers, closed);
        assert!(answers.next().now_or_never().is_none());
        // As seen by who is not told yet.
        close.send_if_modified(|closing| {
            *closing = true;
            false
        });
        drop(packets);
        let last = answers.next().await.unwrap().unwrap_err();
        assert!(last.message().contains("shutting down"), "{last}");
        assert!(answers.next().await.is_none());
    }

    #[tokio::test]
    async fn a_stream_that_ends_by_itself_says_nothing_of_closing() {
        let (_close, closed) = watch::channel(false);
        let (packets, answers) = mpsc::channel(1);
        drop(packets);
        assert!(Answers::new(answers, closed).next().await.is_none());
    }
}
