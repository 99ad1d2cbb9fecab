package main

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/agent"
	"sallyport/internal/attest"
	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
	"sallyport/internal/region"
	"sallyport/internal/sink"
	"sallyport/internal/svid"
)

// Config is the manual of the sidecar. It is read from one YAML file; the
// environment (SALLYPORT_DATA_DIR, SALLYPORT_LOG_LEVEL, ...) goes before the
// file, and a flag before both.
type Config struct {
	// TrustDomain is the name of the trust domain, such as "corp.example".
	// Required.
	TrustDomain spiffeid.TrustDomain `yaml:"trust_domain"`
	// Environment is what the condition env.name= of a row compares with, such
	// as "prod". Without it such a row never holds.
	Environment string `yaml:"environment"`
	// DataDir keeps what must survive a restart: the last good snapshot, the
	// SVIDs and the audit log. Mode 0700. Required.
	DataDir string `yaml:"data_dir"`
	// RunDir holds the sockets: admin.sock and workload.sock. Mode 0700.
	// Default: "run" inside DataDir.
	RunDir string `yaml:"run_dir"`

	Issuer   agent.Join         `yaml:"issuer"`
	Policy   agent.Policy       `yaml:"policy"`
	Workload WorkloadConfig     `yaml:"workload"`
	Inbound  InboundConfig      `yaml:"inbound"`
	Outbound OutboundConfig     `yaml:"outbound"`
	Egress   EgressConfig       `yaml:"egress"`
	Capture  CaptureConfig      `yaml:"capture"`
	Names    NamesConfig        `yaml:"names"`
	Limits   LimitsConfig       `yaml:"limits"`
	Shadow   ShadowConfig       `yaml:"shadow"`
	TLS      TLSConfig          `yaml:"tls"`
	Audit    sink.ListConfig    `yaml:"audit"`
	Log      daemon.LogConfig   `yaml:"log"`
	Drain    daemon.DrainConfig `yaml:"drain"`
	Metrics  sink.MetricsConfig `yaml:"metrics"`
	Tracing  sink.TracesConfig  `yaml:"tracing"`

	// Archives keep joined records of calls that were copied, by the name that a
	// route gives.
	Archives map[string]ArchiveConfig `yaml:"archives"`

	// Regions are databases in MaxMind's format by the names that routes give
	// them: files, which are read again when they change.
	Regions map[string]string `yaml:"regions"`

	// Pprof serves profiles on the admin socket: what the process spends time and
	// memory on. Default: no; the flag --pprof sets it.
	Pprof bool `yaml:"pprof"`
}

// WorkloadConfig is about the program beside the sidecar.
type WorkloadConfig struct {
	// Identity is the SPIFFE ID to serve. Needed only when this node is
	// entitled to several.
	Identity spiffeid.ID `yaml:"identity"`
	// Labels say more of this instance, such as "version=v2,zone=eu-1": subsets of
	// routes take endpoints by them, and calls stay in their zone where that is
	// asked for. Optional.
	Labels mesh.Labels `yaml:"labels"`
	// Socket of the SPIFFE Workload API. Default: "workload.sock" in RunDir.
	Socket string `yaml:"socket"`
	// Kubelet tells which pod a process belongs to, for the selectors k8s:ns,
	// k8s:sa, k8s:pod-name and k8s:pod-label.
	Kubelet attest.KubeletConfig `yaml:"kubelet"`
}

// InboundConfig is the mTLS listener for callers. Without Listen there is none.
type InboundConfig struct {
	// Listen is host:port, by custom port 15006.
	Listen string `yaml:"listen"`
	// Advertise is the address that peers dial. Default: Listen.
	Advertise netip.AddrPort `yaml:"advertise"`
	// App is where the application listens in clear text, on this machine.
	App netip.AddrPort `yaml:"app"`
	// AppProtocol is what it speaks there: "http/1.1", or "h2c" for HTTP/2 with
	// prior knowledge, as servers of gRPC do. Callers may speak either. Default
	// "http/1.1".
	AppProtocol string `yaml:"app_protocol"`
	// Rates bound how often each caller may make which calls; beyond it 429. A
	// call must be within every rate that speaks of it.
	Rates []mesh.CallRate `yaml:"rates"`
	// ProxyProtocol are the load balancers, as prefixes, whose connections begin
	// with a header of the PROXY protocol, version 2. It is the address in audit
	// records and in what the application is told, and proves nothing.
	ProxyProtocol []netip.Prefix `yaml:"proxy_protocol"`
	// ForwardedFrom are the load balancers, as SPIFFE IDs or patterns of them as
	// in a row, that are believed when they say in X-Forwarded-For through which
	// addresses a call came: the application is told these before the load
	// balancer's own. Nobody else is. It proves nothing either.
	ForwardedFrom []string `yaml:"forwarded_from"`
}

// What an application can speak.
const (
	appHTTP1 = "http/1.1"
	appH2C   = "h2c"
)

// OutboundConfig is how the application reaches others.
type OutboundConfig struct {
	// Listen is the proxy for the application, HTTP and SOCKS 5: on loopback, by
	// custom 127.0.0.1:15001. Without it there is no proxy.
	Listen netip.AddrPort `yaml:"listen"`
	// Upstreams are loopback ports of their own for single services, for
	// programs that know no proxy.
	Upstreams []UpstreamConfig `yaml:"upstreams"`
	// KeepForwardedFor is for a workload that is a load balancer: what it says in
	// X-Forwarded-For goes on to the services it calls, which believe it only by
	// ForwardedFrom. Default: it is dropped.
	KeepForwardedFor bool `yaml:"keep_forwarded_for"`
}

// UpstreamConfig gives one service a loopback port.
type UpstreamConfig struct {
	Service mesh.ServiceName `yaml:"service"`
	Listen  netip.AddrPort   `yaml:"listen"`
}

// EgressConfig says which gateways lead out. Without it CONNECT is refused.
type EgressConfig struct {
	// Gateway is the SPIFFE ID that a gateway must prove.
	Gateway spiffeid.ID `yaml:"gateway"`
	// Addresses are the gateways, tried in turn.
	Addresses []netip.AddrPort `yaml:"addresses"`
	// Inspection is a file that is kept for the workload: the certificate, in PEM, by
	// which gateways stand in for hosts whose destination says tls: inspect, and for
	// no others. Default: none is kept.
	Inspection string `yaml:"inspection"`
}

// TLSConfig is about mutual TLS in the mesh, which is always 1.3.
type TLSConfig struct {
	// KeyExchange are the groups that handshakes may use: x25519mlkem768, x25519,
	// p256. Both ends must have one in common. Default: all, of which the hybrid
	// with ML-KEM is taken; without it handshakes are cheaper, and what is
	// recorded today can be read by who has a quantum computer later.
	KeyExchange []svid.Group `yaml:"key_exchange"`
}

// Validate reports every mistake, each by the name of its field.
func (c *Config) Validate() error {
	var errs []error
	need := func(ok bool, field, what string) {
		if !ok {
			errs = append(errs, fmt.Errorf("%s: %s", field, what))
		}
	}
	need(!c.TrustDomain.IsZero(), "trust_domain", `missing; write the name of your trust domain, such as "corp.example"`)
	need(c.DataDir != "", "data_dir", `missing; write a directory of the sidecar's own, such as "/var/lib/sallyport/sidecar"`)
	errs = append(errs, c.Issuer.Validate(), c.Policy.Validate(), c.Workload.Kubelet.Validate())
	id := c.Workload.Identity
	need(id.IsZero() || id.MemberOf(c.TrustDomain), "workload.identity", fmt.Sprintf("%s is not in trust domain %s", id, c.TrustDomain))
	if c.Inbound.Listen != "" {
		need(c.Inbound.App.IsValid(), "inbound.app", `missing; write where the application listens, such as "127.0.0.1:8080"`)
		need(!c.Inbound.App.IsValid() || c.Inbound.App.Addr().IsLoopback(), "inbound.app", "is not a loopback address; what leaves the machine in clear text is not protected")
	}
	need(slices.Contains([]string{"", appHTTP1, appH2C}, c.Inbound.AppProtocol), "inbound.app_protocol",
		fmt.Sprintf("%q is not a protocol of applications; write %q or %q", c.Inbound.AppProtocol, appHTTP1, appH2C))
	for i, r := range c.Inbound.Rates {
		for _, err := range r.Validate() {
			errs = append(errs, fmt.Errorf("inbound.rates[%d].%w", i, err))
		}
	}
	for i, p := range c.Inbound.ForwardedFrom {
		if err := mesh.CheckIDPattern(p); err != nil {
			errs = append(errs, fmt.Errorf("inbound.forwarded_from[%d]: %w", i, err))
		}
	}
	loopback := func(field string, a netip.AddrPort) {
		need(!a.IsValid() || a.Addr().IsLoopback(), field, fmt.Sprintf("%s is not a loopback address; only programs on this machine may use it", a))
	}
	loopback("outbound.listen", c.Outbound.Listen)
	for i, u := range c.Outbound.Upstreams {
		f := fmt.Sprintf("outbound.upstreams[%d]", i)
		need(u.Service != "", f+".service", "missing")
		need(u.Listen.IsValid(), f+".listen", `missing; write a loopback address, such as "127.0.0.1:9001"`)
		loopback(f+".listen", u.Listen)
	}
	need(len(c.Egress.Addresses) == 0 || !c.Egress.Gateway.IsZero(), "egress.gateway", "missing; write the SPIFFE ID of the gateway, it must be proved")
	errs = append(errs, c.validateShadow(), fieldsOf("regions", region.Validate(c.Regions)), c.validateCapture(), c.validateNames(), c.Limits.Validate(), c.Audit.Validate(), c.Log.Validate(), c.Drain.Validate(), c.Metrics.Validate(), c.Tracing.Validate())
	return errors.Join(errs...)
}

// fill sets the defaults that depend on other fields.
func (c *Config) fill() {
	if c.RunDir == "" {
		c.RunDir = filepath.Join(c.DataDir, "run")
	}
	if c.Workload.Socket == "" {
		c.Workload.Socket = filepath.Join(c.RunDir, "workload.sock")
	}
	c.Drain = c.Drain.WithDefaults()
	c.Capture.Config = c.Capture.WithDefaults()
}
