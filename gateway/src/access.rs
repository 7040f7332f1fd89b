//! Which clients may do what: bearer tokens with a scope each.

use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use afterimage_core::{ClientId, Tenant};
use afterimage_http::Peer;
use afterimage_wire::server::{Tenants, Token};
use axum::extract::{Request, State};
use axum::http::{Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;

use crate::Shared;
use crate::keys::{Granted, Keys, Limit};
use crate::oip::grpc_scope;
use crate::problem::Problem;

/// What a token allows. A higher scope includes the lower ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// Statistics, the model, metrics.
    Read,
    /// Also answers.
    Infer,
    /// Also flush and forget.
    Admin,
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Scope::Read => "read",
            Scope::Infer => "infer",
            Scope::Admin => "admin",
        })
    }
}

impl FromStr for Scope {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "read" => Ok(Scope::Read),
            "infer" => Ok(Scope::Infer),
            "admin" => Ok(Scope::Admin),
            _ => Err(format!("{text:?} is not a scope; expected read, infer or admin")),
        }
    }
}

/// A client that a token or a key admits.
struct Admitted {
    scope: Scope,
    tenant: Tenant,
    limit: Option<Limit>,
}

impl Admitted {
    fn new(scope: Scope) -> Self {
        Admitted { scope, tenant: Tenant::default(), limit: None }
    }
}

/// Tokens and their scopes.
#[derive(Clone, Default)]
pub struct Access {
    /// Empty if there is none: then each client has `open`.
    tokens: Vec<(Token, Scope)>,
    /// Their tokens allow [`Scope::Infer`].
    tenants: Option<Tenants>,
    keys: Option<Keys>,
    open: Option<Scope>,
}

impl Access {
    /// The same with `scope` for each client without a token.
    #[must_use]
    pub fn open_to(mut self, scope: Scope) -> Self {
        self.open = Some(scope);
        self
    }

    /// Whether each client may use the model, without a token.
    pub fn is_open(&self) -> bool {
        self.admit(None).is_some_and(|admitted| admitted.scope >= Scope::Infer)
    }

    /// The same with a token that allows `scope`.
    #[must_use]
    pub fn token(mut self, token: Token, scope: Scope) -> Self {
        self.tokens.push((token, scope));
        self
    }

    /// The same with tenants, whose tokens allow [`Scope::Infer`].
    #[must_use]
    pub fn tenants(mut self, tenants: Tenants) -> Self {
        self.tenants = Some(tenants);
        self
    }

    /// The tenants, to load them again.
    pub fn own_tenants(&self) -> impl Iterator<Item = &Tenants> {
        self.tenants.iter()
    }

    /// The same with API keys.
    #[must_use]
    pub fn keys(mut self, keys: Keys) -> Self {
        self.keys = Some(keys);
        self
    }

    /// The API keys, to load them again.
    pub fn own_keys(&self) -> Option<&Keys> {
        self.keys.as_ref()
    }

    /// The tokens, to load them again.
    pub fn tokens(&self) -> impl Iterator<Item = &Token> {
        self.tokens.iter().map(|(token, _)| token)
    }

    /// The rights of a client that shows `token`; `None` if it is wrong or missing.
    fn admit(&self, token: Option<&[u8]>) -> Option<Admitted> {
        if self.tokens.is_empty() && self.tenants.is_none() && self.keys.is_none() {
            return Some(Admitted::new(self.open.unwrap_or(Scope::Admin)));
        }
        let Some(shown) = token else { return self.open.map(Admitted::new) };
        let key = self.keys.as_ref().and_then(|keys| keys.find(shown));
        let tenant = self.tenants.as_ref().and_then(|tenants| tenants.of(shown));
        // All are compared always, so that the time does not depend on which one is right.
        let scopes = self.tokens.iter().map(|(token, scope)| (token.matches(shown), *scope));
        let found = scopes.fold(
            None,
            |found, (equal, scope)| {
                if equal { found.max(Some(scope)) } else { found }
            },
        );
        let tenant = tenant.map(|tenant| Admitted { tenant, ..Admitted::new(Scope::Infer) });
        let key = key.map(|Granted { scope, limit }| Admitted { limit, ..Admitted::new(scope) });
        found.map(Admitted::new).or(tenant).or(key).or(self.open.map(Admitted::new))
    }
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scopes: Vec<_> = self.tokens.iter().map(|(_, scope)| scope).collect();
        f.debug_struct("Access").field("tokens", &scopes).field("open", &self.open).finish()
    }
}

/// The scope that a request needs.
fn needed(method: &Method, path: &str) -> Scope {
    if let Some(scope) = grpc_scope(path) {
        return scope;
    }
    match path {
        "/v1/classify" => Scope::Infer,
        path if path.starts_with("/v2/models/") && path.ends_with("/infer") => Scope::Infer,
        path if path.starts_with("/v1/memory") => Scope::Admin,
        _ if method == Method::GET || method == Method::HEAD => Scope::Read,
        _ => Scope::Admin,
    }
}

/// Refuses requests whose token does not allow them.
pub(crate) async fn check(
    State(shared): State<Arc<Shared>>,
    mut request: Request,
    next: Next,
) -> Result<Response, Problem> {
    let shown = request.headers().get(header::AUTHORIZATION).map(|value| value.as_bytes());
    // The scheme is case-insensitive (RFC 9110, section 11.1).
    let token = shown.and_then(|value| {
        let (scheme, token) = value.split_at_checked(7)?;
        scheme.eq_ignore_ascii_case(b"bearer ").then(|| token.trim_ascii())
    });
    let needed = needed(request.method(), request.uri().path());
    match shared.options.access.admit(token) {
        Some(Admitted { scope, tenant, limit }) if scope >= needed => {
            if let Some(limit) = limit {
                limit.take(Instant::now()).map_err(|wait| too_many(&limit, wait))?;
            }
            let peer = request.extensions().get::<Peer>().map(|peer| peer.address.ip());
            let client = client_of(peer, tenant);
            request.extensions_mut().insert(client);
            Ok(next.run(request).await)
        }
        Some(_) => Err(Problem::new(
            StatusCode::FORBIDDEN,
            "unauthorized",
            format!("this token does not allow {} {}", request.method(), request.uri().path()),
        )),
        None => Err(Problem::new(
            StatusCode::UNAUTHORIZED,
            "unauthenticated",
            "the token is missing or wrong; send it as `Authorization: Bearer TOKEN`",
        )),
    }
}

/// The refusal of a request above the limit of its key.
fn too_many(limit: &Limit, wait: Duration) -> Problem {
    let detail = format!("this key allows {} requests; try again later", limit.rate);
    let mut problem = Problem::new(StatusCode::TOO_MANY_REQUESTS, "rate_limited", detail);
    // The header has whole seconds.
    problem.retry_after = Some(u32::try_from(wait.as_secs() + 1).unwrap_or(u32::MAX));
    problem
}

/// The client of a request, for fair queues: its address within its tenant.
fn client_of(address: Option<IpAddr>, tenant: Tenant) -> ClientId {
    let mut hasher = DefaultHasher::new();
    address.hash(&mut hasher);
    ClientId { tenant, number: hasher.finish() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(text: &str) -> Token {
        Token::new(text).unwrap()
    }

    fn scope(access: &Access, token: Option<&[u8]>) -> Option<Scope> {
        access.admit(token).map(|admitted| admitted.scope)
    }

    #[test]
    fn a_tenant_may_ask_the_model_and_counts_as_one() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("tenants");
        std::fs::write(&file, "search secret 7").unwrap();
        let access = Access::default().tenants(Tenants::read(file).unwrap());
        let Admitted { scope, tenant, .. } = access.admit(Some(b"secret")).unwrap();
        assert_eq!((scope, tenant.weight), (Scope::Infer, 7));
        assert!(access.admit(None).is_none() && access.admit(Some(b"other")).is_none());
        let of = |last| client_of(Some([192, 0, 2, last].into()), tenant);
        assert!(of(1) == of(1) && of(1) != of(2));
    }

    #[test]
    fn the_highest_scope_of_a_token_counts() {
        let access =
            Access::default().token(token("a"), Scope::Read).token(token("a"), Scope::Admin);
        assert_eq!(scope(&access, Some(b"a")), Some(Scope::Admin));
        assert_eq!(scope(&access, Some(b"b")), None);
        assert_eq!(scope(&access, None), None);
    }

    #[test]
    fn an_open_gateway_limits_strangers_to_its_scope() {
        let access = Access::default().open_to(Scope::Infer);
        assert_eq!(scope(&access, None), Some(Scope::Infer));
        assert_eq!(scope(&access, Some(b"anything")), Some(Scope::Infer));
        assert_eq!(scope(&Access::default(), None), Some(Scope::Admin));
    }

    #[test]
    fn each_route_needs_a_scope() {
        assert_eq!(needed(&Method::GET, "/v1/stats"), Scope::Read);
        assert_eq!(needed(&Method::POST, "/v1/classify"), Scope::Infer);
        assert_eq!(needed(&Method::POST, "/v2/models/classifier/infer"), Scope::Infer);
        assert_eq!(needed(&Method::GET, "/v2/models/classifier"), Scope::Read);
        let grpc = |call| needed(&Method::POST, call);
        assert_eq!(grpc("/inference.GRPCInferenceService/ModelInfer"), Scope::Infer);
        assert_eq!(grpc("/inference.GRPCInferenceService/ModelMetadata"), Scope::Read);
        assert_eq!(needed(&Method::DELETE, "/v1/memory"), Scope::Admin);
        assert_eq!(needed(&Method::POST, "/v1/memory/forget"), Scope::Admin);
        assert_eq!(needed(&Method::POST, "/v1/a-later-route"), Scope::Admin);
    }
}
