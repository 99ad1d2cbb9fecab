// Package telemetry counts: metric handles, the golden signals of each call,
// trace context and spans, and the edges of who called whom.
//
// It keeps numbers and decides nothing. Handles are looked up once and cached
// by their users: counting allocates nothing. It starts no goroutine.
package telemetry

import (
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	dto "github.com/prometheus/client_model/go"
)

type (
	counterFamily   = family[Counter, *Counter]
	gaugeFamily     = family[Gauge, *Gauge]
	histogramFamily = family[Histogram, *Histogram]
	expiryFamily    = family[Expiry, *Expiry]
)

// A Registry holds the metrics of one process. A nil Registry hands out nil
// handles, which count nothing.
type Registry struct {
	reg       *prometheus.Registry
	now       func() time.Time
	home      string // the trust domain whose identities are named by their path alone
	sweepers  sweepers
	sized     []interface{ size() (string, int) }
	saturated *saturation

	requests, reqBytes, respBytes, tcpOpened, tcpClosed    *counterFamily
	latency, ttfb, named                                   *histogramFamily
	inflight                                               *gaugeFamily
	authz, mismatch, candidate, audit, sinks, sinkErrs     *counterFamily
	shadow, archived, retries, ejections, connects         *counterFamily
	tls, turned, broken, unread, asked, tunnelB            *counterFamily
	reloads, rotations, lookups, askedUp, tokenKeys        *counterFamily
	messages, rollouts, delivered, rejected, capped, spans *counterFamily
	pushed                                                 *counterFamily
	cutOff, open, tunnels, federated, revision             *gaugeFamily
	expiry                                                 *expiryFamily
	sinkLags                                               *lags
}

// NewRegistry returns a registry with all metrics of the house, and those of
// the Go runtime and of the process.
func NewRegistry() *Registry {
	r := &Registry{reg: prometheus.NewRegistry(), now: time.Now}
	r.reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	r.capped = counters(r, 1, "sallyport_series_capped_total", "Look-ups of label combinations that had no room left and count as other, by metric.", "metric")
	r.reg.MustRegister(sizes{r})
	r.calls()
	r.decisions()
	r.traffic()
	r.identity()
	r.saturated = newSaturation(r)
	r.sinkLags = newLags(r)
	return r
}

// calls are the golden signals.
func (r *Registry) calls() {
	r.requests = counters(r, 6, "sallyport_requests_total", "Calls that ended: code is the status of HTTP, grpc that of gRPC, flag why a proxy answered in the service's place.",
		"reporter", "proto", "code", "grpc", "flag", "tls", "src", "dst", "route")
	r.latency = newFamily[Histogram](r, 2, "sallyport_request_duration_seconds", "Time from the first byte of the request to the last of the response.", "reporter", "class", "src", "dst", "route")
	r.ttfb = newFamily[Histogram](r, 0, "sallyport_request_ttfb_seconds", "Time from the first byte of the request to the first of the response, as the caller's proxy sees it.", "dst", "route")
	r.reqBytes = counters(r, 1, "sallyport_request_bytes_total", "Bytes of request bodies, and of streams towards the service.", "reporter", "src", "dst", "route")
	r.respBytes = counters(r, 1, "sallyport_response_bytes_total", "Bytes of response bodies, and of streams from the service.", "reporter", "src", "dst", "route")
	r.inflight = gauges(r, 1, "sallyport_inflight", "Calls that are running.", "reporter", "dst")
	r.tcpOpened = counters(r, 1, "sallyport_tcp_opened_total", "Streams and tunnels that began.", "reporter", "src", "dst")
	r.tcpClosed = counters(r, 1, "sallyport_tcp_closed_total", "Streams and tunnels that ended.", "reporter", "src", "dst")
	r.spans = counters(r, 1, "sallyport_trace_spans_total", "Spans by what became of them: sent, refused by the collector, or dropped since the queue was full or the rate too high.", "result")
	r.pushed = counters(r, 1, "sallyport_metrics_exports_total", "Times that the metrics were sent to a collector, or could not be.", "result")
}

// decisions are what the judge and the audit log have to say.
func (r *Registry) decisions() {
	r.authz = counters(r, 1, "sallyport_authz_total", "Decisions, by effect and the rule that decided.", "effect", "rule")
	r.mismatch = counters(r, 0, "sallyport_authz_mismatch_total", "Decisions on which the index and its oracle disagreed.")
	r.mismatch.get(labels{})
	r.candidate = counters(r, 1, "sallyport_policy_candidate_total", "Calls that the candidate policy would decide otherwise, by kind of difference and the row that makes it.", "difference", "rule")
	r.audit = counters(r, 1, "sallyport_audit_records_total", "Audit records written, by kind.", "kind")
	r.sinks = counters(r, 1, "sallyport_audit_sink_records_total", "Audit records that a sink took, or refused and were set aside.", "result", "sink")
	r.sinkErrs = counters(r, 1, "sallyport_audit_sink_errors_total", "Batches that a sink did not take.", "sink")
	r.rejected = counters(r, 0, "sallyport_policy_rejected_total", "Policy revisions that were refused; the last good one stayed.")
	r.rejected.get(labels{})
	r.revision = gauges(r, 0, "sallyport_policy_revision", "Policy revision in force.")
	r.rollouts = counters(r, 1, "sallyport_policy_rollout_steps_total", "Steps of policies that a canary group tries: try, promote, take_back, hold.", "step")
	r.delivered = counters(r, 1, "sallyport_rollout_steps_total", "Steps of rollouts of routes: start, advance, gate, pause, promote, complete, stall, roll_back, abort, supersede.", "step")
	r.reloads = counters(r, 2, "sallyport_reloads_total", "Times that something new was read and put in force, or refused.", "result", "what")
}

// traffic is what happens to calls and connections on their way.
func (r *Registry) traffic() {
	r.shadow = counters(r, 1, "sallyport_shadow_total", "Copies of calls for shadow backends, by what became of them.", "outcome", "shadow")
	r.archived = counters(r, 1, "sallyport_archive_records_total", "Records of copied calls for an archive, kept or dropped.", "result", "archive")
	r.retries = counters(r, 2, "sallyport_retries_total", "Further tries of calls, by what the one before came to, and whether the service's budget had one left.", "reason", "budget", "dst")
	r.ejections = counters(r, 1, "sallyport_ejections_total", "Endpoints that were put aside for what they did, by service.", "reason", "dst")
	r.cutOff = gauges(r, 0, "sallyport_breaker_open", "1 while the calls to a service fail at once since it kept failing.", "dst")
	r.connects = counters(r, 1, "sallyport_upstream_connects_total", "Attempts to connect to a service, by result.", "result", "dst")
	r.tls = counters(r, 2, "sallyport_tls_failures_total", "TLS handshakes that failed, by reason.", "reporter", "reason")
	r.open = gauges(r, 2, "sallyport_connections", "Connections that are open to a listener; proving are those whose peer has not proved an identity yet, resting those, and streams, that have carried no call for a while.", "reporter", "state")
	r.turned = counters(r, 2, "sallyport_connections_refused_total", "Connections that were closed because of a limit, by which: total, peer, handshakes, resets, streams.", "reporter", "reason")
	r.broken = counters(r, 2, "sallyport_hop_violations_total", "Connections between proxies that ended because the peer broke the protocol, by how.", "reporter", "reason")
	r.unread = counters(r, 2, "sallyport_requests_refused_total", "Requests that were refused for their form, size or slowness, by reason.", "reporter", "reason")
	r.asked = counters(r, 1, "sallyport_dns_questions_total", "Questions that the nameserver has answered or dropped, by what became of them.", "result")
	r.named = newFamily[Histogram](r, 1, "sallyport_dns_duration_seconds", "Time from a question to its answer: ready answers were made before, made ones for the question, real ones have addresses that were looked up.", "answer")
	r.tunnels = gauges(r, 0, "sallyport_egress_tunnels", "Tunnels that are open, by caller.", "src")
	r.tunnelB = counters(r, 1, "sallyport_egress_bytes_total", "Bytes through tunnels, up is out of the mesh.", "direction", "src", "dst")
}

// identity is about certificates and those who make them.
func (r *Registry) identity() {
	r.expiry = newFamily[Expiry](r, 1, "sallyport_cert_expiry_seconds", "Seconds until a certificate expires, negative afterwards.", "cert")
	r.rotations = counters(r, 1, "sallyport_svid_rotations_total", "Attempts to renew an SVID, by result.", "result")
	r.lookups = counters(r, 2, "sallyport_federation_fetches_total", "Looks at the bundle endpoints of other trust domains, by result.", "result", "trust_domain")
	r.federated = gauges(r, 1, "sallyport_federation_refreshed_timestamp_seconds", "When the bundle of another trust domain was last found good, as Unix time.", "trust_domain")
	r.tokenKeys = counters(r, 2, "sallyport_token_key_fetches_total", "Looks at the keys of issuers of tokens, by result.", "result", "issuer")
	r.askedUp = counters(r, 1, "sallyport_ca_upstream_requests_total", "Questions to the upstream authority of the CA, by result.", "result")
	r.messages = counters(r, 1, "sallyport_issuer_messages_total", "Messages that reached the issuer over mutual TLS, by method: one of a plain call, each of a stream.", "method")
}

func counters(r *Registry, fixed int, name, help string, names ...string) *counterFamily {
	return newFamily[Counter](r, fixed, name, help, names...)
}

func gauges(r *Registry, fixed int, name, help string, names ...string) *gaugeFamily {
	return newFamily[Gauge](r, fixed, name, help, names...)
}

// Gather returns all metrics as they stand.
func (r *Registry) Gather() ([]*dto.MetricFamily, error) {
	r.sweepers.sweep(r.now())
	return r.reg.Gather()
}

// Home says which trust domain is ours: its identities are named by their path
// alone. It is called before anything is counted.
func (r *Registry) Home(trustDomain string) *Registry {
	r.home = trustDomain
	return r
}

// clock reads the time; a test may have set it.
func (r *Registry) clock() time.Time { return r.now() }

// Handler serves the metrics to a scraper: as text, and to one that asks for it
// with exemplars, or with native histograms.
func (r *Registry) Handler() http.Handler {
	if r == nil {
		return http.NotFoundHandler()
	}
	h := promhttp.HandlerFor(r.reg, promhttp.HandlerOpts{MaxRequestsInFlight: 4, EnableOpenMetrics: true})
	return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		r.sweepers.sweep(r.now())
		h.ServeHTTP(w, q)
	})
}
