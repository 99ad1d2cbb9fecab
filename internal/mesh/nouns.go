package mesh

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// A ServiceName is the short name of a service, a single DNS label.
// Inside the mesh it is reached as "<name>.mesh.internal".
type ServiceName string

// Domain is the DNS suffix of every service name inside the mesh.
const Domain = "mesh.internal"

// A Direction says which side of the mesh a rule speaks of.
type Direction string

// The two directions: a call between workloads, and a call out of the mesh.
const (
	In  Direction = "in"
	Out Direction = "out"
)

// An Effect is what a rule does to the calls it matches. Deny overrides.
type Effect string

// The two effects.
const (
	Allow Effect = "allow"
	Deny  Effect = "deny"
)

// An Origin is where in the reviewed files a noun was written.
type Origin struct {
	File string `json:"file,omitempty"`
	Line int    `json:"line,omitempty"`
}

func (o Origin) String() string { return fmt.Sprintf("%s:%d", o.File, o.Line) }

// A Service is a workload identity that others may call by name.
type Service struct {
	Name ServiceName `json:"name"`
	// ID is the SPIFFE ID that every endpoint of the service must prove.
	ID spiffeid.ID `json:"identity"`
	// Port is the port that rules name, not the port an endpoint listens on.
	Port uint16 `json:"port"`
	// Protocol is HTTP or TCP.
	Protocol string `json:"protocol"`
	// Stream says how the connections of a TCP service are carried.
	Stream Stream `json:"stream,omitzero"`
	// Audit is AuditFull when each call to the service has a record of its
	// own; empty when calls that are allowed are counted.
	Audit string `json:"audit,omitempty"`
	// Fail is FailOpen when a call goes on that cannot be recorded; empty when
	// it is refused.
	Fail   string `json:"fail,omitempty"`
	Origin Origin `json:"origin"`
}

// The values of Service.Protocol.
const (
	// HTTP: every request is judged by its verb and path.
	HTTP = "http"
	// TCP: a connection is judged once, as CONNECT with the path "-", and then
	// carried as it is.
	TCP = "tcp"
)

// A Stream says how the connections of a TCP service are carried.
type Stream struct {
	// Idle ends a connection on which nothing moves. Default 1 h.
	Idle time.Duration `json:"idle,omitempty"`
	// Life ends a connection whatever moves. 0: no limit.
	Life time.Duration `json:"life,omitempty"`
	// Proxy is "v2" when the application is told the caller by a header of the
	// PROXY protocol before all else; empty for none.
	Proxy string `json:"proxy,omitempty"`
}

// The values of Audit and Fail of a Service and of a Route. Of a service the usual
// ones, AuditCounted and FailClosed, are written as empty.
const (
	AuditFull    = "full"
	AuditCounted = "counted"
	FailOpen     = "open"
	FailClosed   = "closed"
)

// A Keeping is how calls are recorded. One that is denied has a record of its own
// whatever it says, as far as the budget of denials goes; with Full beyond it, too.
type Keeping struct {
	Full bool // each has a record of its own
	Open bool // one that cannot be recorded goes on
}

// Keeping is how the calls to the service are recorded, as far as no route says.
func (s *Service) Keeping() Keeping { return Keeping{s.Audit == AuditFull, s.Fail == FailOpen} }

// By is k as a route has it, which may be nil.
func (k Keeping) By(r *Route) Keeping {
	if r == nil {
		return k
	}
	if r.Audit != "" {
		k.Full = r.Audit == AuditFull
	}
	if r.Fail != "" {
		k.Open = r.Fail == FailOpen
	}
	k.Open = k.Open && !k.Full
	return k
}

// An Endpoint is one place where a service is reached: the inbound mTLS
// listener of the sidecar beside it.
type Endpoint struct {
	Service ServiceName    `json:"service"`
	Address netip.AddrPort `json:"address"`
	// Agent is the node identity of the sidecar that announced the endpoint.
	Agent spiffeid.ID `json:"agent"`
	// Labels are what the sidecar says of it; subsets and zones are chosen by
	// them.
	Labels Labels `json:"labels,omitempty"`
}

// A Rule is one row of access.csv or guardrails.csv. The patterns are text as
// written, already checked; internal/authz gives them meaning.
type Rule struct {
	ID     string    `json:"id"`
	Dir    Direction `json:"dir"`
	Src    string    `json:"src"`
	Dst    string    `json:"dst"`
	Port   string    `json:"port"`
	Verb   string    `json:"verb"`
	Path   string    `json:"path"`
	Cond   string    `json:"cond"`
	Effect Effect    `json:"effect"`
	Origin Origin    `json:"origin"`
}

// A GroupKind says what the members of a group are.
type GroupKind string

// Callers come from rows "g", destinations from rows "g2".
const (
	CallerGroup      GroupKind = "g"
	DestinationGroup GroupKind = "g2"
)

// A Membership is one row "g" or "g2": Member belongs to Group. Members may be
// groups themselves, to a depth of eight and without cycles.
type Membership struct {
	Kind   GroupKind `json:"kind"`
	Member string    `json:"member"`
	Group  string    `json:"group"`
	Origin Origin    `json:"origin"`
}

// A Destination says how an external host is reached. Who may reach it is
// said by rules with direction Out.
type Destination struct {
	// Host is a lower-case DNS name, "*." and a name, or an address.
	Host string `json:"host"`
	// Proto is what the workload speaks: "tls" (default), "http" or "tcp".
	Proto string `json:"proto"`
	// TLS is what a gateway does about it: nothing when empty, Originate or Inspect.
	// With these, and with proto "http", each request is judged by itself.
	TLS string `json:"tls,omitempty"`
	// CA are certificates in PEM, to which that of the host must lead. Default:
	// those that the gateway's system trusts.
	CA string `json:"ca,omitempty"`
	// Probe has the gateway see for itself that the host has a certificate for its
	// name, before it opens tunnels of TLS to an address of it.
	Probe bool `json:"probe,omitempty"`
	// ALPN are the protocols that a hello in a tunnel may offer, or that the gateway
	// speaks with the host where it asks itself. Empty: any, and HTTP/1.1.
	ALPN []string `json:"alpn,omitempty"`
	// Upgrade are the protocols that a request may have its connection become:
	// WebSocket, or none.
	Upgrade []string `json:"upgrade,omitempty"`
	// Inject has the gateway add a credential to requests; nil: none.
	Inject *Inject `json:"inject,omitempty"`
	// SNI is "strict" (default: present and equal to the authority) or
	// "optional" (may be absent; if present, equal).
	SNI string `json:"sni"`
	// ECH is AllowGREASE when a hello may carry what looks like an encrypted name, as
	// those of browsers do, behind the name that was allowed; empty: it may not.
	ECH string `json:"ech,omitempty"`
	// DNS is RealAddresses when workloads are told the host's own addresses; empty
	// when virtual ones.
	DNS string `json:"dns,omitempty"`
	// Private lists address ranges that this host may resolve to although they
	// are private. A local or metadata address needs its own /32 or /128.
	Private []netip.Prefix `json:"private,omitempty"`
	// Endpoints, when set, are dialled instead of what DNS says. They are
	// screened all the same.
	Endpoints []Outlet `json:"endpoints,omitempty"`
	// Budget is what each workload may use of this destination.
	Budget Allowance `json:"budget,omitzero"`
	// Mode is what becomes of a call to this host that access.csv denies; empty: as
	// modes.yaml says. Guardrails are no part of it.
	Mode Mode `json:"mode,omitempty"`
	// ConnectTimeout bounds one dial. Default 5 s. Timeouts.Connect is another word
	// for it.
	ConnectTimeout time.Duration `json:"connect_timeout,omitempty"`
	// Resilience is what is done when the host is late or fails.
	Resilience
	Origin Origin `json:"origin"`
}

// An Inject is a credential that a gateway has and its workloads do not.
type Inject struct {
	// Secret is the name that the gateway's configuration has it under.
	Secret string `json:"secret"`
	// Header is the field that carries it, behind Prefix, such as "Bearer ". What a
	// workload sends in that field does not go on.
	Header string `json:"header"`
	Prefix string `json:"prefix,omitempty"`
	// Paths are the patterns of the requests that get it.
	Paths []string `json:"paths"`
}

// For says whether a request for a path gets the credential.
func (i *Inject) For(path string) bool {
	return slices.ContainsFunc(i.Paths, func(p string) bool { return MatchPath(p, path) })
}

// always says whether each request gets the credential.
func (i *Inject) always() bool {
	deepest := 0
	for _, p := range i.Paths {
		deepest = max(deepest, strings.Count(p, "/"))
	}
	// A segment that no pattern spells is matched as any other would be.
	path := ""
	for range deepest + 1 {
		if !i.For(path+"/") || !i.For(path+"/\x00") {
			return false
		}
		path += "/\x00"
	}
	return true
}

// Equal says whether the same is injected where; nil is nothing.
func (i *Inject) Equal(other *Inject) bool {
	if i == nil || other == nil {
		return i == other
	}
	return i.Secret == other.Secret && i.Header == other.Header && i.Prefix == other.Prefix && slices.Equal(i.Paths, other.Paths)
}

// The values of Destination.TLS beside none.
const (
	// Originate: requests come in the clear, and go on to the host over TLS under its
	// own name.
	Originate = "originate"
	// Inspect: requests come over TLS that ends at the gateway, which stands in for
	// the host, and go on as with Originate.
	Inspect = "inspect"
)

// The values of Destination.Proto.
const (
	ProtoTLS  = "tls"
	ProtoHTTP = "http"
	ProtoTCP  = "tcp"
)

// WebSocket is a value in Destination.Upgrade.
const WebSocket = "websocket"

// The values in Destination.ALPN of what the gateway speaks itself.
const (
	ALPNHTTP1 = "http/1.1"
	ALPNHTTP2 = "h2"
)

// An Allowance is what one workload may use of a destination, through all gateways
// together. Zero means any amount.
type Allowance struct {
	// Up and Down are bytes in an hour.
	Up   int64 `json:"up,omitempty"`
	Down int64 `json:"down,omitempty"`
	// Conns are tunnels and requests that are open at once.
	Conns int `json:"conns,omitempty"`
	// Names are the hosts below a pattern that are asked for in an hour.
	Names int `json:"names,omitempty"`
}

// AllowGREASE is a value of Destination.ECH.
const AllowGREASE = "allow-grease"

// RealAddresses is a value of Destination.DNS.
const RealAddresses = "real"

// A Selector is one fact that attestation must establish, such as
// {"unix", "uid:1000"}.
type Selector struct {
	Type  string `json:"type"`
	Value string `json:"value"`
}

func (s Selector) String() string { return s.Type + ":" + s.Value }

// An Entry says which SPIFFE ID a workload gets when it has all selectors and
// is attested by the agent ParentID, by one with the alias ParentID, or by one
// that has an entry for ParentID; see Lineage. With the issuer as its parent it
// makes an alias.
type Entry struct {
	// ID is stable: the hash of parent, identity and selectors, unless written.
	ID        string      `json:"id"`
	SPIFFEID  spiffeid.ID `json:"spiffe_id"`
	ParentID  spiffeid.ID `json:"parent_id"`
	Selectors []Selector  `json:"selectors"`
	// X509TTL and JWTTTL are lifetimes; zero means the issuer's default.
	X509TTL  time.Duration `json:"x509_ttl,omitempty"`
	JWTTTL   time.Duration `json:"jwt_ttl,omitempty"`
	DNSNames []string      `json:"dns_names,omitempty"`
	Hint     string        `json:"hint,omitempty"`
	// FederatesWith are other trust domains whose bundles the workload gets.
	FederatesWith []spiffeid.TrustDomain `json:"federates_with,omitempty"`
	// WeakSelectors accepts path or sha256 selectors that stand alone.
	WeakSelectors bool `json:"weak_selectors,omitempty"`
	// Admin lets the identity call what operators call, Downstream what an
	// issuer below this one calls.
	Admin      bool `json:"admin,omitempty"`
	Downstream bool `json:"downstream,omitempty"`
	// ExpiresAt ends the entry; zero means never. CreatedAt and Revision, which
	// rises with every change, are those of an entry made by a call.
	ExpiresAt time.Time `json:"expires_at,omitzero"`
	CreatedAt time.Time `json:"created_at,omitzero"`
	Revision  int64     `json:"revision,omitempty"`
	Origin    Origin    `json:"origin"`
}

// A Case is one expectation of policies/tests: a call and its decision.
type Case struct {
	Name string      `json:"name"`
	From spiffeid.ID `json:"from"`
	// To is a service name, a SPIFFE ID, or "host:" and a host name.
	To   string    `json:"to"`
	Port uint16    `json:"port"`
	Verb string    `json:"verb"`
	Path string    `json:"path"`
	SNI  string    `json:"sni,omitempty"`
	Now  time.Time `json:"now,omitzero"`
	// Environment is compared with env.name=, and Token is what the caller's
	// token says; nil means that the caller shows none.
	Environment string     `json:"environment,omitempty"`
	Token       *CaseToken `json:"token,omitempty"`
	Want        Effect     `json:"want"`
	// Rule, when set, is the ID of the row that must decide.
	Rule string `json:"rule,omitempty"`
	// Way has what must hold of how a call to a host outside goes out, by the names
	// that "policy explain" prints; "none" is for what must not.
	Way    map[string]string `json:"way,omitempty"`
	Origin Origin            `json:"origin"`
}

// A CaseToken is what the token of a Case says, once verified.
type CaseToken struct {
	Issuer   string            `json:"iss,omitempty" yaml:"iss"`
	Audience []string          `json:"aud,omitempty" yaml:"aud"`
	Scopes   []string          `json:"scope,omitempty" yaml:"scope"`
	Claims   map[string]string `json:"claims,omitempty" yaml:"claims"`
	ACR      int               `json:"acr,omitempty" yaml:"acr"`
	// Bound means that the token is bound to the caller's key.
	Bound bool `json:"bound,omitempty" yaml:"bound"`
}

// Policies is everything that people review: the parsed folder policies/.
type Policies struct {
	TrustDomain  spiffeid.TrustDomain `json:"trust_domain"`
	Services     []Service            `json:"services"`
	Rules        []Rule               `json:"rules"`
	Memberships  []Membership         `json:"memberships"`
	Destinations []Destination        `json:"destinations"`
	Routes       []Routes             `json:"routes,omitempty"`
	Entries      []Entry              `json:"entries"`
	Cases        []Case               `json:"cases"`
	// Admin are the rows of admin.csv; without any, operators have the rights
	// that their entries give.
	Admin []AdminRule `json:"admin,omitempty"`
	// Tokens is tokens.yaml; nil means that no token and no API key counts.
	Tokens *Tokens `json:"tokens,omitempty"`
	// Modes are the files of rows that are not enforced.
	Modes []FileMode `json:"modes,omitempty"`
	// Candidate has the rows that are tried beside Rules and Memberships; nil
	// when none are.
	Candidate *Rows `json:"candidate,omitempty"`
}

// A Snapshot is what one proxy acts on: immutable once made, swapped whole.
type Snapshot struct {
	// Revision counts every change the issuer distributes: policy or endpoints.
	Revision uint64 `json:"revision"`
	// PolicyRevision counts accepted changes of the reviewed files, and
	// PolicyHash is the SHA-256 of the whole reviewed set, in hex.
	PolicyRevision uint64               `json:"policy_revision"`
	PolicyHash     string               `json:"policy_hash"`
	TrustDomain    spiffeid.TrustDomain `json:"trust_domain"`
	Services       []Service            `json:"services"`
	Endpoints      []Endpoint           `json:"endpoints"`
	Rules          []Rule               `json:"rules"`
	Memberships    []Membership         `json:"memberships"`
	Destinations   []Destination        `json:"destinations"`
	Routes         []Routes             `json:"routes,omitempty"`
	// Shares are those of canaries whose rollout was started.
	Shares []CanaryShare `json:"shares,omitempty"`
	// Tokens is nil for a proxy that has no token to check.
	Tokens *Tokens `json:"tokens,omitempty"`
	// Shown has the issuers of the tokens by whose claims calls of the workload take
	// their route; nil when no route asks for a claim.
	Shown *Tokens `json:"shown_tokens,omitempty"`
	// Modes are the files of rows that are not enforced.
	Modes []FileMode `json:"modes,omitempty"`
	// PolicySet is the hash of the signed set that says all this but Endpoints;
	// empty when nobody must have signed. It travels beside the rest.
	PolicySet string `json:"-"`
	// Candidate has the rows that are tried beside these, and nothing else; nil
	// when none are. It travels and is hashed apart: a proxy that cannot use it
	// uses the rest.
	Candidate *Snapshot `json:"-"`
}
