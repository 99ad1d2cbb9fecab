// Package telemetry counts: metric handles, the golden signals of each call,
// W3C trace context, and the edges of who called whom.
//
// It keeps numbers and decides nothing. Handles are looked up once and cached
// by their users: counting allocates nothing. It starts no goroutine.
package telemetry

import (
	"maps"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// maxSeries bounds the time series of one metric. A caller can invent names
// (a flood of identities, a route per path); a server that scrapes thousands
// of proxies cannot pay for them. What is beyond counts under Other.
const maxSeries = 2000

// Other is the label value of all that had no room left.
const Other = "other"

// A Counter only goes up. A nil Counter counts nothing.
type Counter struct{ c prometheus.Counter }

// Add adds n; a negative n is a mistake and adds nothing.
func (c *Counter) Add(n int64) {
	if c != nil && n > 0 {
		c.c.Add(float64(n))
	}
}

// Inc adds one.
func (c *Counter) Inc() {
	if c != nil {
		c.c.Inc()
	}
}

// A Gauge goes up and down. A nil Gauge keeps nothing.
type Gauge struct{ g prometheus.Gauge }

// Set stores v.
func (g *Gauge) Set(v float64) {
	if g != nil {
		g.g.Set(v)
	}
}

// Add adds n, which may be negative.
func (g *Gauge) Add(n int64) {
	if g != nil {
		g.g.Add(float64(n))
	}
}

// An Expiry is a moment shown as the seconds that remain until it. A nil
// Expiry keeps nothing.
type Expiry struct{ at atomic.Int64 }

// Set stores the moment; the zero time means that there is none yet.
func (e *Expiry) Set(t time.Time) {
	if e == nil {
		return
	}
	if t.IsZero() {
		e.at.Store(0)
		return
	}
	e.at.Store(t.UnixNano())
}

// labels are the values of up to six labels, comparable so that a look-up
// allocates nothing.
type labels [6]string

// A family is one metric with its cached handles, at most maxSeries of them
// and one Other for each combination of the fixed labels.
type family[T any] struct {
	children atomic.Pointer[map[labels]T]
	// mu serialises additions; readers take the map as it is.
	mu     sync.Mutex
	names  int // labels in use
	fixed  int // leading labels that keep their value beyond the cap
	create func(values ...string) T
	full   prometheus.Counter
}

// get returns the handle of the label values, made on first use.
func (f *family[T]) get(l labels) T {
	have := *f.children.Load()
	if c, ok := have[l]; ok {
		return c
	}
	if len(have) >= maxSeries {
		f.full.Inc()
		for i := f.fixed; i < f.names; i++ {
			l[i] = Other
		}
		if c, ok := have[l]; ok {
			return c
		}
	}
	return f.add(l)
}

// add stands apart from get because its labels escape to the heap.
func (f *family[T]) add(l labels) T {
	f.mu.Lock()
	defer f.mu.Unlock()
	have := *f.children.Load()
	if c, ok := have[l]; ok {
		return c
	}
	next := maps.Clone(have)
	c := f.create(l[:f.names]...)
	next[l] = c
	f.children.Store(&next)
	return c
}

// A Registry holds the metrics of one process. A nil Registry hands out nil
// handles, which count nothing.
type Registry struct {
	reg    *prometheus.Registry
	now    func() time.Time
	capped *prometheus.CounterVec

	requests  *family[*Counter]
	latency   *family[prometheus.Observer]
	reqBytes  *family[*Counter]
	respBytes *family[*Counter]
	inflight  *family[*Gauge]
	authz     *family[*Counter]
	shadow    *family[*Counter]
	copies    *family[*Counter]
	archived  *family[*Counter]
	audit     *family[*Counter]
	tls       *family[*Counter]
	conns     *family[*Gauge]
	connects  *family[*Counter]
	open      *family[*Gauge]
	turned    *family[*Counter]
	broken    *family[*Counter]
	unread    *family[*Counter]
	asked     *family[*Counter]
	tunnels   *family[*Gauge]
	tunnelB   *family[*Counter]
	expiry    *family[*Expiry]
	reloads   *family[*Counter]
	rotations *family[*Counter]
	federated *family[*Gauge]
	lookups   *family[*Counter]
	askedUp   *family[*Counter]
	tokenKeys *family[*Counter]
	sinks     *family[*Counter]
	sinkErrs  *family[*Counter]
	sinkLags  *lags
	messages  *family[*Counter]
	rollouts  *family[*Counter]
	delivered *family[*Counter]
	retries   *family[*Counter]
	ejections *family[*Counter]
	cutOff    *family[*Gauge]
	revision  *Gauge
	rejected  *Counter
	mismatch  *Counter
}

// buckets are those of OpenTelemetry's http.server.request.duration, seconds.
var buckets = []float64{.005, .01, .025, .05, .075, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10}

// NewRegistry returns a registry with all metrics of the house, and those of
// the Go runtime and of the process.
func NewRegistry() *Registry {
	r := &Registry{reg: prometheus.NewRegistry(), now: time.Now}
	r.capped = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "sallyport_series_capped_total",
		Help: "Look-ups of label combinations that had no room left and count as other, by metric.",
	}, []string{"metric"})
	r.reg.MustRegister(r.capped, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))

	r.requests = counters(r, 3, "sallyport_requests_total", "Calls that ended.", "reporter", "proto", "code", "src", "dst", "route")
	r.reqBytes = counters(r, 1, "sallyport_request_bytes_total", "Bytes of request bodies.", "reporter", "src", "dst", "route")
	r.respBytes = counters(r, 1, "sallyport_response_bytes_total", "Bytes of response bodies.", "reporter", "src", "dst", "route")
	r.inflight = gauges(r, 1, "sallyport_inflight", "Calls that are running.", "reporter", "dst")
	r.authz = counters(r, 1, "sallyport_authz_total", "Decisions, by effect and the rule that decided.", "effect", "rule")
	r.shadow = counters(r, 1, "sallyport_shadow_total", "Calls that the candidate policy would decide otherwise, by kind of difference and the row that makes it.", "difference", "rule")
	r.copies = counters(r, 1, "sallyport_shadow_copies_total", "Copies of calls for shadow backends, by what became of them.", "outcome", "shadow")
	r.archived = counters(r, 1, "sallyport_archive_records_total", "Records of copied calls for an archive, kept or dropped.", "result", "archive")
	r.mismatch = r.counter("sallyport_authz_mismatch_total", "Decisions on which the index and its oracle disagreed.")
	r.audit = counters(r, 0, "sallyport_audit_records_total", "Audit records appended, by kind.", "kind")
	r.tls = counters(r, 1, "sallyport_tls_failures_total", "TLS handshakes that failed, by reason.", "reporter", "reason")
	r.conns = gauges(r, 1, "sallyport_upstream_connections", "Connections to a service, active or idle in the pool.", "state", "dst")
	r.connects = counters(r, 1, "sallyport_upstream_connects_total", "Attempts to connect to a service, by result.", "result", "dst")
	r.open = gauges(r, 1, "sallyport_connections", "Connections that are open to a listener; proving are those whose peer has not proved an identity yet, resting those, and streams, that have carried no call for a while.", "reporter", "state")
	r.turned = counters(r, 2, "sallyport_connections_refused_total", "Connections that were closed because of a limit, by which: total, peer, handshakes, resets, streams.", "reporter", "reason")
	r.broken = counters(r, 2, "sallyport_hop_violations_total", "Connections between proxies that ended because the peer broke the protocol, by how.", "reporter", "reason")
	r.asked = counters(r, 1, "sallyport_dns_questions_total", "Questions that the nameserver has answered or dropped, by what became of them.", "result")
	r.unread = counters(r, 2, "sallyport_requests_refused_total", "Requests that were refused for their form, size or slowness, by reason.", "reporter", "reason")
	r.tunnels = gauges(r, 0, "sallyport_egress_tunnels", "Tunnels that are open, by caller.", "src")
	r.tunnelB = counters(r, 1, "sallyport_egress_bytes_total", "Bytes through tunnels, up is out of the mesh.", "direction", "src", "dst")
	r.reloads = counters(r, 1, "sallyport_reloads_total", "Reloads of files, by result.", "result", "what")
	r.rotations = counters(r, 0, "sallyport_svid_rotations_total", "Attempts to renew an SVID, by result.", "result")
	r.federated = gauges(r, 0, "sallyport_federation_refreshed_timestamp_seconds", "When the bundle of another trust domain was last found good, as Unix time.", "trust_domain")
	r.tokenKeys = counters(r, 1, "sallyport_token_key_fetches_total", "Looks at the keys of issuers of tokens, by result.", "result", "issuer")
	r.sinks = counters(r, 1, "sallyport_audit_sink_records_total", "Audit records that a sink took, or refused and were set aside.", "result", "sink")
	r.sinkErrs = counters(r, 0, "sallyport_audit_sink_errors_total", "Batches that a sink did not take.", "sink")
	r.sinkLags = newLags(r)
	r.askedUp = counters(r, 1, "sallyport_ca_upstream_requests_total", "Questions to the upstream authority of the CA, by result.", "result")
	r.messages = counters(r, 0, "sallyport_issuer_messages_total", "Messages that reached the issuer over mutual TLS, by method: one of a plain call, each of a stream.", "method")
	r.lookups = counters(r, 1, "sallyport_federation_fetches_total", "Looks at the bundle endpoints of other trust domains, by result.", "result", "trust_domain")
	r.delivered = counters(r, 1, "sallyport_rollout_steps_total", "Steps of rollouts of routes: start, advance, gate, pause, promote, complete, stall, roll_back, abort, supersede.", "step")
	r.rollouts = counters(r, 1, "sallyport_policy_rollout_steps_total", "Steps of policies that a canary group tries: try, promote, take_back, hold.", "step")
	r.retries = counters(r, 1, "sallyport_retries_total", "Further tries of calls: sent, or withheld since the budget was spent.", "result", "dst")
	r.ejections = counters(r, 0, "sallyport_ejections_total", "Endpoints that were put aside for what they did, by service.", "dst")
	r.cutOff = gauges(r, 0, "sallyport_breaker_open", "1 while the calls to a service fail at once since it kept failing.", "dst")
	r.rejected = r.counter("sallyport_policy_rejected_total", "Policy revisions that were refused; the last good one stayed.")

	latency := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "sallyport_request_duration_seconds", Help: "Time from the first byte of the request to the last of the response.", Buckets: buckets,
	}, []string{"reporter", "class", "src", "dst", "route"})
	r.reg.MustRegister(latency)
	r.latency = newFamily(r, "sallyport_request_duration_seconds", 5, 2, latency.WithLabelValues)

	revision := prometheus.NewGauge(prometheus.GaugeOpts{Name: "sallyport_policy_revision", Help: "Policy revision in force."})
	r.reg.MustRegister(revision)
	r.revision = &Gauge{revision}
	r.expiry = newFamily(r, "sallyport_cert_expiry_seconds", 1, 0, func(...string) *Expiry { return new(Expiry) })
	r.reg.MustRegister(expiries{r})
	return r
}

func newFamily[T any](r *Registry, metric string, names, fixed int, create func(values ...string) T) *family[T] {
	f := &family[T]{names: names, fixed: fixed, create: create, full: r.capped.WithLabelValues(metric)}
	f.children.Store(&map[labels]T{})
	return f
}

func counters(r *Registry, fixed int, name, help string, names ...string) *family[*Counter] {
	v := prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, names)
	r.reg.MustRegister(v)
	return newFamily(r, name, len(names), fixed, func(l ...string) *Counter { return &Counter{v.WithLabelValues(l...)} })
}

func gauges(r *Registry, fixed int, name, help string, names ...string) *family[*Gauge] {
	v := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: name, Help: help}, names)
	r.reg.MustRegister(v)
	return newFamily(r, name, len(names), fixed, func(l ...string) *Gauge { return &Gauge{v.WithLabelValues(l...)} })
}

func (r *Registry) counter(name, help string) *Counter {
	c := prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	r.reg.MustRegister(c)
	return &Counter{c}
}

// expiries shows each Expiry as the seconds that remain when it is scraped:
// an alert needs no arithmetic, and a stopped clock in a proxy shows.
type expiries struct{ r *Registry }

var expiryDesc = prometheus.NewDesc("sallyport_cert_expiry_seconds",
	"Seconds until a certificate expires, negative afterwards.", []string{"cert"}, nil)

func (e expiries) Describe(ch chan<- *prometheus.Desc) { ch <- expiryDesc }

func (e expiries) Collect(ch chan<- prometheus.Metric) {
	now := e.r.now()
	for l, x := range *e.r.expiry.children.Load() {
		if at := x.at.Load(); at != 0 {
			left := time.Unix(0, at).Sub(now).Seconds()
			ch <- prometheus.MustNewConstMetric(expiryDesc, prometheus.GaugeValue, left, l[0])
		}
	}
}

// Handler serves the metrics to a scraper.
func (r *Registry) Handler() http.Handler {
	if r == nil {
		return http.NotFoundHandler()
	}
	return promhttp.HandlerFor(r.reg, promhttp.HandlerOpts{MaxRequestsInFlight: 4})
}
