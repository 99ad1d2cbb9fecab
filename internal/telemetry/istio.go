package telemetry

import (
	"cmp"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
)

// istio shows the calls once more under the names that Istio gives them, for
// dashboards that know those. It counts nothing: each scrape adds up what there
// is, so that both say the same.
type istio struct {
	r                             *Registry
	requests, took, up, down      *prometheus.Desc
	sent, received, begun, closed *prometheus.Desc
}

// IstioNames has the calls of proxies shown under Istio's names as well. It is
// called once.
func (r *Registry) IstioNames() {
	ends := []string{
		"reporter", "source_workload", "source_workload_namespace", "source_principal", "source_canonical_service",
		"destination_workload", "destination_workload_namespace", "destination_principal", "destination_canonical_service",
		"destination_service", "destination_service_name", "destination_service_namespace", "connection_security_policy", "request_protocol",
	}
	desc := func(name, help string, more ...string) *prometheus.Desc {
		return prometheus.NewDesc(name, help, append(ends[:len(ends):len(ends)], more...), nil)
	}
	r.reg.MustRegister(&istio{
		r:        r,
		requests: desc("istio_requests_total", "sallyport_requests_total as Istio names it.", "response_code", "grpc_response_status", "response_flags"),
		took:     desc("istio_request_duration_milliseconds", "sallyport_request_duration_seconds as Istio names it."),
		up:       desc("istio_request_bytes", "sallyport_request_bytes_total as Istio names it."),
		down:     desc("istio_response_bytes", "sallyport_response_bytes_total as Istio names it."),
		sent:     desc("istio_tcp_sent_bytes_total", "sallyport_response_bytes_total of streams as Istio names it."),
		received: desc("istio_tcp_received_bytes_total", "sallyport_request_bytes_total of streams as Istio names it."),
		begun:    desc("istio_tcp_connections_opened_total", "sallyport_tcp_opened_total as Istio names it."),
		closed:   desc("istio_tcp_connections_closed_total", "sallyport_tcp_closed_total as Istio names it."),
	})
}

// Describe implements prometheus.Collector.
func (i *istio) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{i.requests, i.took, i.up, i.down, i.sent, i.received, i.begun, i.closed} {
		ch <- d
	}
}

// A pair is who called whom, as a reporter of Istio's saw it.
type pair struct{ reporter, src, dst string }

// An answered is the calls of a pair that came to the same.
type answered struct {
	pair
	proto, code, grpc, flag string
}

// A carried is what is known of all calls of a pair.
type carried struct {
	up, down, begun, closed uint64
	calls                   uint64
	streams                 bool
	took                    [len(bounds) + 1]uint64
	sum                     float64 // seconds
}

// Collect implements prometheus.Collector.
func (i *istio) Collect(ch chan<- prometheus.Metric) {
	answers, pairs := i.calls()
	i.bytes(pairs)
	for a, n := range answers {
		ch <- prometheus.MustNewConstMetric(i.requests, prometheus.CounterValue, float64(n), append(i.r.istioEnds(a.pair, a.proto), a.code, a.grpc, a.flag)...)
	}
	for p, c := range pairs {
		if c.streams {
			ends := i.r.istioEnds(p, ProtoTCP)
			for d, n := range map[*prometheus.Desc]uint64{i.sent: c.down, i.received: c.up, i.begun: c.begun, i.closed: c.closed} {
				ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(n), ends...)
			}
			continue
		}
		ends := i.r.istioEnds(p, ProtoHTTP)
		ch <- prometheus.MustNewConstSummary(i.up, c.calls, float64(c.up), nil, ends...)
		ch <- prometheus.MustNewConstSummary(i.down, c.calls, float64(c.down), nil, ends...)
		buckets, n := map[float64]uint64{}, uint64(0)
		for b, le := range bounds {
			n += c.took[b]
			buckets[float64(le.Milliseconds())] = n
		}
		ch <- prometheus.MustNewConstHistogram(i.took, n+c.took[len(bounds)], c.sum*1000, buckets, ends...)
	}
}

// calls adds up what became of calls, and how long they took. Routes are no labels
// of Istio's.
func (i *istio) calls() (map[answered]uint64, map[pair]*carried) {
	answers, pairs := map[answered]uint64{}, map[pair]*carried{}
	of := func(p pair) *carried {
		if pairs[p] == nil {
			pairs[p] = new(carried)
		}
		return pairs[p]
	}
	i.r.tcpOpened.each(func(l labels, c *Counter) {
		if p, ok := istioPair(l[0], l[1], l[2]); ok {
			x := of(p)
			x.streams = true
			x.begun += c.n.Load()
		}
	})
	i.r.tcpClosed.each(func(l labels, c *Counter) {
		if p, ok := istioPair(l[0], l[1], l[2]); ok {
			of(p).closed += c.n.Load()
		}
	})
	i.r.requests.each(func(l labels, c *Counter) {
		p, ok := istioPair(l[0], l[6], l[7])
		if !ok || l[1] == ProtoTCP {
			return
		}
		code := l[2]
		if code == "none" {
			code = "0"
		}
		n := c.n.Load()
		answers[answered{p, l[1], code, l[3], istioFlag(l[4])}] += n // of which some are one
		of(p).calls += n
	})
	i.r.latency.each(func(l labels, h *Histogram) {
		if p, ok := istioPair(l[0], l[2], l[3]); ok {
			x := of(p)
			for b := range h.classic {
				x.took[b] += h.classic[b].Load()
			}
			x.sum += float64(h.sum.Load()) / 1e9
		}
	})
	return answers, pairs
}

// bytes adds up what the calls of each pair carried.
func (i *istio) bytes(pairs map[pair]*carried) {
	add := func(f *counterFamily, to func(*carried) *uint64) {
		f.each(func(l labels, c *Counter) {
			p, ok := istioPair(l[0], l[1], l[2])
			if x := pairs[p]; ok && x != nil {
				*to(x) += c.n.Load()
			}
		})
	}
	add(i.r.reqBytes, func(x *carried) *uint64 { return &x.up })
	add(i.r.respBytes, func(x *carried) *uint64 { return &x.down })
}

// istioPair says how Istio calls a reporter: at a gateway nobody counts at the
// other end. What the issuer is asked is no call of a workload.
func istioPair(reporter, src, dst string) (pair, bool) {
	src, dst = cmp.Or(src, unknown), cmp.Or(dst, unknown)
	switch reporter {
	case "inbound":
		return pair{"destination", src, dst}, true
	case "outbound", "gateway":
		return pair{"source", src, dst}, true
	}
	return pair{}, false
}

// istioEnds are the values of the labels that all have.
func (r *Registry) istioEnds(p pair, proto string) []string {
	src, from, caller := r.istioWorkload(p.src)
	dst, to, callee := r.istioWorkload(p.dst)
	service := dst
	if to != unknown {
		service += "." + to
	}
	return []string{p.reporter, src, from, caller, src, dst, to, callee, dst, service, dst, to, "mutual_tls", proto}
}

const unknown = "unknown" // as Istio has it

// istioWorkload takes the name of a service apart, if it has the form that a
// workload of Kubernetes has.
func (r *Registry) istioWorkload(name string) (workload, namespace, principal string) {
	domain, path := r.home, name
	if !strings.HasPrefix(path, "ns/") {
		domain, path, _ = strings.Cut(path, "/")
	}
	if part := strings.Split(path, "/"); len(part) == 4 && part[0] == "ns" && part[2] == "sa" {
		return part[3], part[1], "spiffe://" + domain + "/" + path
	}
	return name, unknown, unknown
}

// istioFlags are the flags of Envoy that mean the same as ours. Those that it has
// none for keep their word.
var istioFlags = map[string]string{
	"": "-", "no_endpoint": "UH", "circuit_open": "UO", "overload": "OM", "timeout": "UT", "rate": "RL", "limit": "RL",
	"upstream": "UF", "malformed": "UPE", "client": "DC", "cut_off": "UC", "policy": "UAEX",
}

func istioFlag(word string) string {
	if f, ok := istioFlags[word]; ok {
		return f
	}
	return word
}
