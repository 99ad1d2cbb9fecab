package main

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/agent"
	"sallyport/internal/daemon"
	"sallyport/internal/egress"
	"sallyport/internal/http1"
	"sallyport/internal/sink"
	"sallyport/internal/svid"
)

// Config is the manual of the gateway. It is read from one YAML file; the
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
	// SVID and the audit log. Mode 0700. Required.
	DataDir string `yaml:"data_dir"`
	// RunDir holds admin.sock. Mode 0700. Default: "run" inside DataDir.
	RunDir string `yaml:"run_dir"`
	// Listen is the mTLS listener for workloads and their sidecars: host:port,
	// by custom port 15443. Required.
	Listen string `yaml:"listen"`
	// Identity is the SPIFFE ID to serve. Needed only when this node is
	// entitled to several.
	Identity spiffeid.ID `yaml:"identity"`
	// Resolvers are the DNS servers that external names are asked of, over UDP
	// and TCP. Required: the system's resolver is never used.
	Resolvers []netip.AddrPort `yaml:"resolvers"`

	// Names answers DNS questions of workloads that have no sidecar to ask.
	Names NamesConfig `yaml:"names"`

	// Secrets are what destinations may have the gateway add to requests, by the
	// names that egress.yaml has them under.
	Secrets []SecretConfig `yaml:"secrets"`

	// InspectionKey is the file with the key by which the gateway stands in for hosts
	// whose destination says tls: inspect. Gateways that have the same are trusted
	// together. It is made if it is not there. Default: "inspection.key" inside
	// DataDir.
	InspectionKey string `yaml:"inspection_key"`

	Issuer  agent.Join         `yaml:"issuer"`
	Policy  agent.Policy       `yaml:"policy"`
	Limits  LimitsConfig       `yaml:"limits"`
	TLS     TLSConfig          `yaml:"tls"`
	Audit   sink.ListConfig    `yaml:"audit"`
	Log     daemon.LogConfig   `yaml:"log"`
	Drain   daemon.DrainConfig `yaml:"drain"`
	Metrics sink.MetricsConfig `yaml:"metrics"`
	Tracing sink.TracesConfig  `yaml:"tracing"`

	// Pprof serves profiles on the admin socket: what the process spends time and
	// memory on. Default: no; the flag --pprof sets it.
	Pprof bool `yaml:"pprof"`
}

// LimitsConfig bounds what callers may send, hold and take time for. Zero means
// the default. What goes beyond is refused; sallyport_connections_refused_total
// counts the connections, the audit log has the rest.
type LimitsConfig struct {
	// Head is the size of the head of a request in bytes, 1024 to 1048576. Default
	// 32768.
	Head int `yaml:"head"`
	// Headers is the number of its field lines, 10 to 10000. Default 100.
	Headers int `yaml:"headers"`
	// Target is the length of its target in bytes, at most Head. Default 8192.
	Target int `yaml:"target"`
	// HeadTimeout is the time from its first byte to the end of its head. Default
	// 10 s.
	HeadTimeout time.Duration `yaml:"head_timeout"`
	// IdleTimeout closes a connection that waits for a request. Default 65 s.
	IdleTimeout time.Duration `yaml:"idle_timeout"`
	// HandshakeTimeout bounds a TLS handshake. Default 5 s.
	HandshakeTimeout time.Duration `yaml:"handshake_timeout"`

	// Connections in all. Default 8192; one more is closed at once.
	Connections int `yaml:"connections"`
	// PeerConnections are those that one identity may have. Default 1024.
	PeerConnections int `yaml:"peer_connections"`
	// Handshakes are the connections whose peer has not proved an identity yet.
	// Default 512; one more closes the one that has taken longest, of the address
	// that has most.
	Handshakes int `yaml:"handshakes"`

	// Tunnels in all, requests under way counted with them. Default 4096.
	Tunnels int `yaml:"tunnels"`
	// TunnelsPerWorkload bounds one caller. Default 512.
	TunnelsPerWorkload int `yaml:"tunnels_per_workload"`
	// Idle closes a tunnel without bytes. Default 1 h.
	Idle time.Duration `yaml:"idle"`
	// Life closes a tunnel however busy. Default 24 h.
	Life time.Duration `yaml:"life"`
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
func (c LimitsConfig) Validate() error {
	var errs []error
	within := func(field string, n, low, high int) {
		if n != 0 && (n < low || n > high) {
			errs = append(errs, fmt.Errorf("limits.%s: %d is not between %d and %d; leave it out for the default", field, n, low, high))
		}
	}
	const least, most = 1 << 10, 1 << 20
	head := c.Head
	if head < least || head > most {
		head = 32 << 10
	}
	within("head", c.Head, least, most)
	within("headers", c.Headers, 10, 10_000)
	within("target", c.Target, 256, head)
	within("connections", c.Connections, 1, most)
	within("peer_connections", c.PeerConnections, 1, most)
	within("handshakes", c.Handshakes, 1, most)
	within("tunnels", c.Tunnels, 1, most)
	within("tunnels_per_workload", c.TunnelsPerWorkload, 1, most)
	for _, d := range []struct {
		field string
		d     time.Duration
	}{{"head_timeout", c.HeadTimeout}, {"idle_timeout", c.IdleTimeout}, {"handshake_timeout", c.HandshakeTimeout}} {
		if d.d != 0 && (d.d < 100*time.Millisecond || d.d > 24*time.Hour) {
			errs = append(errs, fmt.Errorf("limits.%s: %s is not between 100ms and 24h; leave it out for the default", d.field, d.d))
		}
	}
	for field, d := range map[string]time.Duration{"idle": c.Idle, "life": c.Life} {
		if d < 0 {
			errs = append(errs, fmt.Errorf("limits.%s: %s is negative", field, d))
		}
	}
	return errors.Join(errs...)
}

// egress is the same as the gateway takes it.
func (c LimitsConfig) egress() egress.Limits {
	return egress.Limits{
		Request: http1.Limits{Head: c.Head, Headers: c.Headers, Target: c.Target, HeadTimeout: c.HeadTimeout, IdleTimeout: c.IdleTimeout},
		Conns:   c.Connections, ConnsPerCaller: c.PeerConnections, Handshakes: c.Handshakes, HandshakeTimeout: c.HandshakeTimeout,
		Tunnels: c.Tunnels, TunnelsPerCaller: c.TunnelsPerWorkload, Idle: c.Idle, Life: c.Life,
	}
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
	need(c.DataDir != "", "data_dir", `missing; write a directory of the gateway's own, such as "/var/lib/sallyport/gateway"`)
	need(c.Listen != "", "listen", `missing; write host:port, such as "0.0.0.0:15443"`)
	need(len(c.Resolvers) > 0, "resolvers", `missing; write the DNS servers to ask, such as ["192.0.2.53:53"]`)
	errs = append(errs, c.Issuer.Validate(), c.Policy.Validate())
	need(c.Identity.IsZero() || c.Identity.MemberOf(c.TrustDomain), "identity", fmt.Sprintf("%s is not in trust domain %s", c.Identity, c.TrustDomain))
	errs = append(errs, c.Names.validate(), validateSecrets(c.Secrets), c.Limits.Validate(), c.Audit.Validate(), c.Log.Validate(), c.Drain.Validate(), c.Metrics.Validate(), c.Tracing.Validate())
	return errors.Join(errs...)
}

// SecretConfig says where a secret is read: one of file, env and vault. It is read
// when it is asked for, and again after 30 s; one that cannot be read any more
// serves for 10 minutes.
type SecretConfig struct {
	// Name is what inject.secret of a destination says. Required.
	Name string `yaml:"name"`
	// File has the secret and perhaps a line feed.
	File string `yaml:"file"`
	// Env is the name of an environment variable of the gateway.
	Env string `yaml:"env"`
	// Vault is a document that is fetched.
	Vault *VaultConfig `yaml:"vault"`
}

// VaultConfig is a document as Vault serves them: {"data": {"data": {FIELD: ...}}},
// or without the second data.
type VaultConfig struct {
	// URL is all of it, such as "https://vault.example:8200/v1/secret/data/stripe".
	// Required.
	URL string `yaml:"url"`
	// Field has the secret. Default "value".
	Field string `yaml:"field"`
	// TokenFile has what is sent in X-Vault-Token. Required.
	TokenFile string `yaml:"token_file"`
	// CAFile has the authorities that the server's certificate may lead to, in PEM.
	// Default: those of the system.
	CAFile string `yaml:"ca_file"`
}

func validateSecrets(list []SecretConfig) error {
	var errs []error
	seen := map[string]bool{}
	for i, c := range list {
		bad := func(field, format string, args ...any) {
			errs = append(errs, fmt.Errorf("secrets[%d].%s: %s", i, field, fmt.Sprintf(format, args...)))
		}
		n := 0
		for _, set := range []bool{c.File != "", c.Env != "", c.Vault != nil} {
			if set {
				n++
			}
		}
		switch {
		case c.Name == "":
			bad("name", "missing; write what inject.secret of a destination says")
		case seen[c.Name]:
			bad("name", "%q is written twice", c.Name)
		case n != 1:
			bad("name", "%q has %d of file, env and vault; write one", c.Name, n)
		}
		seen[c.Name] = true
		if v := c.Vault; v != nil {
			if u, err := url.Parse(v.URL); err != nil || u.Scheme != "https" || u.Host == "" {
				bad("vault.url", "%q is no https:// URL", v.URL)
			}
			if v.TokenFile == "" {
				bad("vault.token_file", "missing; write the file of the token to show")
			}
		}
	}
	return errors.Join(errs...)
}

// secrets is the same as the gateway takes it.
func (c *Config) secrets() *egress.Secrets {
	out := map[string]egress.SecretSource{}
	for _, s := range c.Secrets {
		from := egress.SecretSource{File: s.File, Env: s.Env}
		if v := s.Vault; v != nil {
			from.Vault = &egress.VaultSource{URL: v.URL, Field: cmp.Or(v.Field, "value"), TokenFile: v.TokenFile, CAFile: v.CAFile}
		}
		out[s.Name] = from
	}
	return egress.NewSecrets(out)
}

// NamesConfig has DNS questions answered over TLS to whoever shows an SVID: as a
// sidecar does for its workload, and with the addresses of hosts whose
// destination says dns: real.
type NamesConfig struct {
	// DoT is host:port for DNS over TLS, by custom port 853; DoH for DNS over
	// HTTPS, at /dns-query. Without one that is not served.
	DoT string `yaml:"dot"`
	DoH string `yaml:"doh"`
	// Virtual and Virtual6 are the ranges of virtual addresses, the same as in
	// sidecars. Default 247.0.0.0/8 and fd00:e::/64.
	Virtual  netip.Prefix `yaml:"virtual"`
	Virtual6 netip.Prefix `yaml:"virtual6"`
	// PerPattern is how many names below one pattern a workload may use in a day.
	// Default 1024.
	PerPattern int `yaml:"per_pattern"`
	// Label is the longest label that stands for the star of a pattern, 1 to 63.
	// Default 63.
	Label int `yaml:"label"`
	// Rate is how many questions a second one workload may ask, and how many at
	// once, up to 1000000; what is beyond gets no answer. Default: any number.
	Rate int `yaml:"rate"`
}

func (c NamesConfig) enabled() bool { return c.DoT != "" || c.DoH != "" }

func (c NamesConfig) validate() error {
	var errs []error
	for field, addr := range map[string]string{"dot": c.DoT, "doh": c.DoH} {
		if addr == "" {
			continue
		}
		if _, port, err := net.SplitHostPort(addr); err != nil || port == "" {
			errs = append(errs, fmt.Errorf("names.%s: %q is no host:port, such as \"0.0.0.0:853\"", field, addr))
		}
	}
	if c.PerPattern < 0 || c.PerPattern > 1<<15 {
		errs = append(errs, fmt.Errorf("names.per_pattern: %d is not between 1 and %d; leave it out for the default", c.PerPattern, 1<<15))
	}
	if c.Rate < 0 || c.Rate > 1_000_000 {
		errs = append(errs, fmt.Errorf("names.rate: %d is not between 1 and 1000000; leave it out for any number", c.Rate))
	}
	if c.Label < 0 || c.Label > 63 {
		errs = append(errs, fmt.Errorf("names.label: %d is not between 1 and 63; leave it out for the default", c.Label))
	}
	if v := c.Virtual; v.IsValid() && (!v.Addr().Is4() || v.Bits() < 8 || v.Bits() > 24 || v != v.Masked()) {
		errs = append(errs, fmt.Errorf("names.virtual: %s is not an IPv4 prefix of 8 to 24 bits", v))
	}
	if v := c.Virtual6; v.IsValid() && (!v.Addr().Is6() || v.Addr().Is4In6() || v.Bits() < 8 || v.Bits() > 96 || v != v.Masked()) {
		errs = append(errs, fmt.Errorf("names.virtual6: %s is not an IPv6 prefix of 8 to 96 bits", v))
	}
	return errors.Join(errs...)
}

// fill sets the defaults that depend on other fields.
func (c *Config) fill() {
	if c.RunDir == "" {
		c.RunDir = filepath.Join(c.DataDir, "run")
	}
	if c.InspectionKey == "" {
		c.InspectionKey = filepath.Join(c.DataDir, "inspection.key")
	}
	c.Drain = c.Drain.WithDefaults()
	if !c.Names.Virtual.IsValid() {
		c.Names.Virtual = netip.MustParsePrefix("247.0.0.0/8")
	}
	if !c.Names.Virtual6.IsValid() {
		c.Names.Virtual6 = netip.MustParsePrefix("fd00:e::/64")
	}
}
