package mesh

import (
	"errors"
	"net/netip"
	"strconv"
	"strings"
	"time"
)

// The nouns of policies/routes: how calls to a service of the mesh, or to a
// host outside it, are carried. Who may call at all is said by rules. Names and
// meaning are those of the Gateway API wherever it has them. The structs are also
// the files as people write them: a field is called there as in JSON.

// Whole is 100 % in basis points, the unit of every share: 1 is 0.01 %.
const Whole = 10_000

// A Share is a part of all calls, in basis points of Whole. It is written in
// percent: "0.25%".
type Share uint16

// MarshalText writes a share as UnmarshalText reads it.
func (s Share) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

func (s Share) String() string {
	return strconv.FormatFloat(float64(s)/100, 'f', -1, 64) + "%"
}

// UnmarshalText reads percent with at most two digits after the point.
func (s *Share) UnmarshalText(text []byte) error {
	whole, part, dotted := strings.Cut(strings.TrimSuffix(string(text), "%"), ".")
	n, err := strconv.ParseUint(whole+(part + "00")[:2], 10, 32)
	if err != nil || text[len(text)-1] != '%' || whole == "" || dotted && part == "" || len(part) > 2 || n > Whole || len(whole) > 3 {
		return errShare
	}
	*s = Share(n)
	return nil
}

var errShare = errors.New("is no share: write percent from 0% to 100% in steps of 0.01%, such as 0.25%")

// Routes is one file of policies/routes.
type Routes struct {
	// Service is what is called, or Host is: a lower-case DNS name outside the
	// mesh, which must be a Destination.
	Service ServiceName `json:"service,omitempty"`
	Host    string      `json:"host,omitempty"`
	// Routes are tried by how specific their matches are: exact path, then
	// regular expressions, then the longest prefix; method, number of headers,
	// number of query parameters, what is asked of the caller (from, region, each
	// claim), and then the order of the file. A call that none matches goes to the
	// service itself.
	Routes []Route `json:"routes,omitempty"`
	// Subsets name endpoints by their labels.
	Subsets []Subset `json:"subsets,omitempty"`
	// What follows is how endpoints are chosen and judged, whichever the route.
	Balance  Balance  `json:"balance,omitzero"`
	Breaker  *Breaker `json:"breaker,omitempty"`
	Outlier  *Outlier `json:"outlier,omitempty"`
	Health   *Health  `json:"health,omitempty"`
	Capacity Capacity `json:"capacity,omitzero"`
	Budget   Budget   `json:"retry_budget,omitzero"`
	Origin   Origin   `json:"origin"`
}

func (r *Routes) locate(o Origin) { r.Origin = o }

// Of is what the routes are of, as a key: no service is called like a host.
func (r *Routes) Of() string {
	if r.Service != "" {
		return string(r.Service)
	}
	return "host:" + r.Host
}

// A Route is what is done with the calls that match.
type Route struct {
	// Name is unique in its file; metrics, records and traces have it.
	Name string `json:"name"`
	// Matches: one of them must hold. Without any all calls match.
	Matches []Match `json:"matches,omitempty"`
	// Exactly one of Backends, Redirect and Respond; without any the service
	// itself is the only backend.
	Backends []Backend `json:"backends,omitempty"`
	Redirect *Redirect `json:"redirect,omitempty"`
	Respond  *Respond  `json:"respond,omitempty"`
	// Sticky says by what a caller stays with its backend.
	Sticky *Sticky `json:"sticky,omitempty"`
	// Rewrite changes the request, Answer the fields of what comes back.
	Rewrite   Rewrite    `json:"rewrite,omitzero"`
	Answer    FieldEdit  `json:"answer,omitzero"`
	CORS      *CORS      `json:"cors,omitempty"`
	Timeouts  Timeouts   `json:"timeouts,omitzero"`
	Retry     *Retry     `json:"retry,omitempty"`
	Hedge     *Hedge     `json:"hedge,omitempty"`
	Faults    []Fault    `json:"faults,omitempty"`
	Shadows   []Shadow   `json:"shadows,omitempty"`
	Limit     *RateLimit `json:"limit,omitempty"`
	Translate *Translate `json:"translate,omitempty"`
	// Plan moves the calls to one of the backends, step by step.
	Plan *Plan `json:"rollout,omitempty"`
	// Audit is AuditFull or AuditCounted, Fail FailOpen or FailClosed, each empty
	// for what the service says. The service's own sidecar goes by them: of the
	// routes that say either, the most specific that matches the call as it comes.
	Audit  string `json:"audit,omitempty"`
	Fail   string `json:"fail,omitempty"`
	Origin Origin `json:"origin"`
}

func (r *Route) locate(o Origin) { r.Origin = o }

// A Match holds when all that it names hold.
type Match struct {
	Path    *Text       `json:"path,omitempty"` // exact, prefix by whole segments, or regex
	Method  string      `json:"method,omitempty"`
	Headers []NamedText `json:"headers,omitempty"` // names without regard to case
	Query   []NamedText `json:"query,omitempty"`
	// GRPC matches the canonical method, whatever face the call has.
	GRPC *GRPCMethod `json:"grpc,omitempty"`
	// From are patterns of SPIFFE IDs, or groups of callers; one must hold.
	From []string `json:"from,omitempty"`
	// Claims are of the verified token: all must be there with that value.
	Claims map[string]string `json:"claims,omitempty"`
	// Region: one must be the caller's, as Source says.
	Region *Region `json:"region,omitempty"`
}

// A Text is how a value is compared: exactly one of its fields is set.
type Text struct {
	Exact   string `json:"exact,omitempty"`
	Prefix  string `json:"prefix,omitempty"`
	Suffix  string `json:"suffix,omitempty"`
	Regex   string `json:"regex,omitempty"` // RE2, the whole value
	Present bool   `json:"present,omitempty"`
	// Not turns the comparison round; a value that is absent then holds.
	Not bool `json:"not,omitempty"`
}

// A NamedText compares the value of that name.
type NamedText struct {
	Name string `json:"name"`
	Text
}

// A GRPCMethod names a service, a method, or both.
type GRPCMethod struct {
	Service string `json:"service,omitempty"`
	Method  string `json:"method,omitempty"`
}

// A Region says where the caller's region stands, and which ones hold.
type Region struct {
	In []string `json:"in"`
	// Exactly one: a header that only a trusted edge sets, a verified claim,
	// ranges of addresses by region, or a database in MaxMind's format.
	Header   string                    `json:"header,omitempty"`
	Claim    string                    `json:"claim,omitempty"`
	Ranges   map[string][]netip.Prefix `json:"ranges,omitempty"`
	Database string                    `json:"database,omitempty"` // by the name that proxies give it
}

// A Backend gets its weight's part of the calls of a route.
type Backend struct {
	// Service is reached; empty for the service of the file. Address is in its
	// place for a host outside the mesh: host:port.
	Service ServiceName `json:"service,omitempty"`
	Address string      `json:"address,omitempty"`
	// Subset narrows the endpoints of Service.
	Subset string `json:"subset,omitempty"`
	// Weight of all weights of the route is the share; 1 unless written, 0 gets
	// nothing.
	Weight uint32 `json:"weight"`
	// Priority: backends with a larger one get calls only when none with a
	// smaller one has endpoints that are well.
	Priority uint8 `json:"priority,omitempty"`
}

func (b *Backend) preset() { b.Weight = 1 }

// A Subset is the endpoints that have all labels, such as version: v2.
type Subset struct {
	Name   string            `json:"name"`
	Labels map[string]string `json:"labels"`
}

// Sticky keeps callers with one key on one backend: a larger weight takes over
// callers of others and gives none of its own away.
type Sticky struct {
	// By is "header", "cookie", "claim", "caller" or "trace"; Name is of the
	// first three. A call without that value is spread by its trace.
	By   string `json:"by"`
	Name string `json:"name,omitempty"`
}

// A FieldEdit changes header fields: Remove, then Set, then Add.
type FieldEdit struct {
	Set    map[string]string `json:"set,omitempty"`
	Add    map[string]string `json:"add,omitempty"`
	Remove []string          `json:"remove,omitempty"`
}

// A Rewrite changes the request that goes on.
type Rewrite struct {
	Host string `json:"host,omitempty"`
	// At most one: the whole path, or what the matched prefix becomes.
	Path   string    `json:"path,omitempty"`
	Prefix string    `json:"prefix,omitempty"`
	Fields FieldEdit `json:"headers,omitzero"`
}

// A Redirect answers with Location. Empty parts are those of the request.
type Redirect struct {
	Scheme string `json:"scheme,omitempty"`
	Host   string `json:"host,omitempty"`
	Port   uint16 `json:"port,omitempty"`
	Path   string `json:"path,omitempty"`
	Prefix string `json:"prefix,omitempty"`
	Status int    `json:"status"` // 301, 302 (default), 303, 307 or 308
}

func (r *Redirect) preset() { r.Status = 302 }

// A Respond answers in the service's place.
type Respond struct {
	Status int    `json:"status"`
	Body   string `json:"body,omitempty"`
	Type   string `json:"content_type,omitempty"`
}

// CORS is that of the Fetch standard.
type CORS struct {
	Origins     []string      `json:"allow_origins"`
	Methods     []string      `json:"allow_methods,omitempty"`
	Headers     []string      `json:"allow_headers,omitempty"`
	Expose      []string      `json:"expose_headers,omitempty"`
	Credentials bool          `json:"allow_credentials,omitempty"`
	MaxAge      time.Duration `json:"max_age,omitempty"`
}

// Timeouts of a call. 0 is none, but Connect, which then is 5 s.
type Timeouts struct {
	// Request bounds the call with all its tries, from its first byte.
	Request time.Duration `json:"request,omitempty"`
	// Try bounds each try, until the answer is whole.
	Try time.Duration `json:"backend_request,omitempty"`
	// Idle ends a call on which nothing moves.
	Idle    time.Duration `json:"idle,omitempty"`
	Connect time.Duration `json:"connect,omitempty"`
}

// Retry says what is tried again, beyond what is always safe: a failure to
// connect, a refused stream, and what a peer that goes away did not process.
type Retry struct {
	// Attempts are further tries. 0 switches retries off; nil in the route has
	// one.
	Attempts int `json:"attempts"`
	// Codes are of HTTP, GRPC names of statuses. They count for GET, HEAD,
	// OPTIONS, PUT, DELETE and calls with an Idempotency-Key, and for others
	// with Unsafe.
	Codes  []int    `json:"codes,omitempty"`
	GRPC   []string `json:"grpc,omitempty"`
	Unsafe bool     `json:"unsafe,omitempty"`
	// Base and Max bound the wait before a further try; half to all of it.
	Base time.Duration `json:"backoff,omitempty"`
	Max  time.Duration `json:"max_backoff,omitempty"`
}

func (r *Retry) preset() { r.Attempts = 1 }

// A Budget bounds the retries of all calls to a service together.
type Budget struct {
	// Share of the calls of the last ten seconds that may be retries, besides
	// Floor retries a second. Default 20 %, 10.
	Share Share `json:"share,omitempty"`
	Floor int   `json:"floor,omitempty"`
}

// Hedge sends a call that is safe to repeat once more when no answer has begun
// after a while; the first answer counts.
type Hedge struct {
	// Exactly one: After that time, or after that in which the share Of of the calls
	// has been answered lately, at most Max. Max is required with it, and is what
	// holds until enough calls are known.
	After time.Duration `json:"after,omitempty"`
	Of    Share         `json:"of,omitempty"`
	Max   time.Duration `json:"max,omitempty"`
}

// Balance says how an endpoint is chosen.
type Balance struct {
	// Policy is "p2c_ewma" (default), "least_request", "round_robin" or
	// "ring_hash".
	Policy string `json:"policy,omitempty"`
	// Hash is the key of ring_hash. Bound is how much more than its share an
	// endpoint gets, in percent; default 125.
	Hash  *Sticky `json:"hash,omitempty"`
	Bound int     `json:"bound,omitempty"`
	// Zone prefers endpoints of the caller's zone while enough are well.
	Zone string `json:"zone,omitempty"` // "prefer" or empty
	// SlowStart is how long a new endpoint takes to its whole share.
	SlowStart time.Duration `json:"slow_start,omitempty"`
	// Panic: with fewer well than this share all endpoints are used. Default
	// 50 %.
	Panic *Share `json:"panic_threshold,omitempty"`
}

// A Breaker opens for a service that fails or is slow, and then lets one call
// through at a time to see.
type Breaker struct {
	Consecutive int           `json:"consecutive,omitempty"`  // failures in a row; default 7
	Success     Share         `json:"success,omitempty"`      // opens below; default off
	Minimum     int           `json:"min_requests,omitempty"` // for Success and Slow, in Window; default 10
	Slow        time.Duration `json:"slow,omitempty"`         // a call longer than this is slow
	SlowShare   Share         `json:"slow_share,omitempty"`   // opens above
	Window      time.Duration `json:"window,omitempty"`       // default 10 s
	Open        time.Duration `json:"open,omitempty"`         // the first wait, doubled up to MaxOpen; default 1 s
	MaxOpen     time.Duration `json:"max_open,omitempty"`     // default 60 s
}

// Outlier puts single endpoints aside.
type Outlier struct {
	Consecutive int           `json:"consecutive,omitempty"` // failures in a row; default 5
	Success     Share         `json:"success,omitempty"`     // below it; default off
	Minimum     int           `json:"min_requests,omitempty"`
	Interval    time.Duration `json:"interval,omitempty"` // default 10 s
	Ejection    time.Duration `json:"ejection,omitempty"` // times the number of ejections, up to MaxEjection; default 30 s
	MaxEjection time.Duration `json:"max_ejection,omitempty"`
	MaxShare    Share         `json:"max_share,omitempty"` // of the endpoints; one always may be, one always stays. Default 50 %
}

// Health asks endpoints whether they are well.
type Health struct {
	// Exactly one: an HTTP path, a service of gRPC health (may be empty with
	// GRPC), or a connection.
	HTTP      string        `json:"http,omitempty"`
	GRPC      *string       `json:"grpc,omitempty"`
	TCP       bool          `json:"tcp,omitempty"`
	Interval  time.Duration `json:"interval,omitempty"` // default 10 s
	Timeout   time.Duration `json:"timeout,omitempty"`  // default 1 s
	Unhealthy int           `json:"unhealthy,omitempty"`
	Healthy   int           `json:"healthy,omitempty"`
}

// Capacity bounds what a service is given at once by one proxy.
type Capacity struct {
	Calls int `json:"calls,omitempty"` // 0: none but the proxy's
	// Adaptive finds the bound from latency, up to Calls.
	Adaptive bool `json:"adaptive,omitempty"`
}

// A RateLimit bounds the calls that a proxy makes by a route.
type RateLimit struct {
	Rate  int `json:"rate"`            // per second
	Burst int `json:"burst,omitempty"` // default: the calls of a second
	// Shared is one limit for all proxies, of which each has a part that follows
	// what it is asked for; the issuer says what all are. By then says for whom:
	// "route" (default) is all who call, "caller" each workload with its replicas.
	// "claim:NAME" is each value of a claim of the caller's token, at each proxy;
	// calls without it are counted as those of one.
	Shared bool   `json:"shared,omitempty"`
	By     string `json:"by,omitempty"`
}

// A Fault is what a fake upstream does with a share of the calls: retries,
// timeouts and breakers see it as they would see the real thing.
type Fault struct {
	Name  string  `json:"name"`
	Match []Match `json:"matches,omitempty"`
	Share Share   `json:"share"`
	// Delay comes before any of the others, of which at most one is set.
	Delay     time.Duration `json:"delay,omitempty"`
	Status    int           `json:"status,omitempty"`
	GRPC      string        `json:"grpc,omitempty"`
	Reset     bool          `json:"reset,omitempty"`
	Bandwidth int64         `json:"bandwidth,omitempty"` // bytes a second
	// Since begins it and Until ends it. Both are required, and not more than 24 h
	// apart: a fault that somebody forgets is over tomorrow, and whoever reviews
	// it need not ask a clock.
	Since time.Time `json:"since"`
	Until time.Time `json:"until"`
	// Callers are patterns of those it may touch. Required.
	Callers []string `json:"callers"`
	// MaxActive bounds the calls that are held at once by one proxy. Default
	// 100.
	MaxActive int `json:"max_active,omitempty"`
}

// A Shadow is a backend that gets copies. What it answers reaches nobody.
type Shadow struct {
	Name    string  `json:"name"`
	Service Backend `json:"backend"`
	Match   []Match `json:"matches,omitempty"`
	Share   Share   `json:"share"`
	// Compare keeps both answers for the report of differences; Ignore are
	// fields of headers or JSON paths that always differ. Noise is a second
	// primary, by which what differs anyway is learned.
	Compare bool     `json:"compare,omitempty"`
	Ignore  []string `json:"ignore,omitempty"`
	Noise   *Backend `json:"noise,omitempty"`
	// Writes sends calls that change things too. Without it only GET, HEAD and
	// OPTIONS are copied.
	Writes bool `json:"writes,omitempty"`
	// Archive is the name of the archive that gets joined records.
	Archive string `json:"archive,omitempty"`
}

// Translate gives the calls of a route another face.
type Translate struct {
	// To is "grpc" (the service speaks gRPC, callers REST, gRPC or gRPC-Web) or
	// "rest" (the service speaks REST, callers gRPC).
	To string `json:"to"`
	// Exactly one: a *.binpb with a FileDescriptorSet beside the routes, or
	// Reflection, which asks the service. Set is what that file holds.
	Descriptors string `json:"descriptors,omitempty"`
	Set         []byte `json:"set,omitempty" yaml:"-"`
	Reflection  bool   `json:"reflection,omitempty"`
	// Services are the protobuf services; all that are found without any.
	Services []string `json:"services,omitempty"`
}
