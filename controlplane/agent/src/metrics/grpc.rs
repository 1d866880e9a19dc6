//! A layer that counts gRPC calls and times them to their last byte.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use http::{HeaderMap, Request, Response};
use hyper::body::{Body as HttpBody, Bytes, Frame, SizeHint};
use prost::Message as _;
use tonic::body::Body;
use tonic::{Code, Status};
use tower::{Layer, Service};

use super::Metrics;

/// Label of a call to a method that is not served.
const OTHER: &str = "other";

/// Measures every call of the services below it.
#[derive(Clone, Debug)]
pub struct MeasureCalls {
    metrics: Metrics,
    /// Path to label.
    methods: Arc<HashMap<String, Arc<str>>>,
}

impl MeasureCalls {
    /// Knows every method of the encoded `FileDescriptorSet`s.
    pub fn new(metrics: Metrics, descriptor_sets: &[&[u8]]) -> Self {
        let mut methods = HashMap::new();
        for bytes in descriptor_sets {
            let set = prost_types::FileDescriptorSet::decode(*bytes).expect("compiled into the agent");
            for file in &set.file {
                for service in &file.service {
                    for method in &service.method {
                        let label = format!("{}.{}/{}", file.package(), service.name(), method.name());
                        methods.insert(format!("/{label}"), Arc::from(label));
                    }
                }
            }
        }
        Self { metrics, methods: Arc::new(methods) }
    }
}

impl<S> Layer<S> for MeasureCalls {
    type Service = Measured<S>;

    fn layer(&self, inner: S) -> Measured<S> {
        Measured { inner, layer: self.clone() }
    }
}

/// A service whose calls are measured.
#[derive(Clone, Debug)]
pub struct Measured<S> {
    inner: S,
    layer: MeasureCalls,
}

impl<S, R> Service<Request<R>> for Measured<S>
where
    S: Service<Request<R>, Response = Response<Body>>,
    S::Future: Send + 'static,
    S::Error: 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<R>) -> Self::Future {
        let method = self.layer.methods.get(request.uri().path()).cloned();
        let mut call = Call {
            metrics: self.layer.metrics.clone(),
            method: method.unwrap_or_else(|| Arc::from(OTHER)),
            started: Instant::now(),
            // What it stays when the caller goes away.
            code: Code::Cancelled,
        };
        let response = self.inner.call(request);
        Box::pin(async move {
            let (head, body) = response.await?.into_parts();
            call.learn(&head.headers);
            Ok(Response::from_parts(head, Body::new(MeasuredBody { body, call })))
        })
    }
}

/// One call; counted when dropped.
struct Call {
    metrics: Metrics,
    method: Arc<str>,
    started: Instant,
    code: Code,
}

impl Call {
    /// A call's status is in its trailers, or in its headers when it has no body.
    fn learn(&mut self, headers: &HeaderMap) {
        if let Some(status) = Status::from_header_map(headers) {
            self.code = status.code();
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.metrics.grpc(&self.method, code_name(self.code), self.started.elapsed());
    }
}

struct MeasuredBody {
    body: Body,
    call: Call,
}

impl HttpBody for MeasuredBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => {
                if let Some(trailers) = frame.trailers_ref() {
                    self.call.learn(trailers);
                }
            }
            Some(Err(status)) => self.call.code = status.code(),
            None => {}
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}
