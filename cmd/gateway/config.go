package main

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/agent"
	"sallyport/internal/daemon"
	"sallyport/internal/sink"
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

	Issuer agent.Join         `yaml:"issuer"`
	Policy agent.Policy       `yaml:"policy"`
	Limits LimitsConfig       `yaml:"limits"`
	Audit  sink.ListConfig    `yaml:"audit"`
	Log    daemon.LogConfig   `yaml:"log"`
	Drain  daemon.DrainConfig `yaml:"drain"`

	// Pprof serves profiles on the admin socket: what the process spends time and
	// memory on. Default: no; the flag --pprof sets it.
	Pprof bool `yaml:"pprof"`
}

// LimitsConfig bounds what callers may hold.
type LimitsConfig struct {
	// Tunnels in all. Default 4096.
	Tunnels int `yaml:"tunnels"`
	// TunnelsPerWorkload bounds one caller. Default 512.
	TunnelsPerWorkload int `yaml:"tunnels_per_workload"`
	// Idle closes a tunnel without bytes. Default 1 h.
	Idle time.Duration `yaml:"idle"`
	// Life closes a tunnel however busy. Default 24 h.
	Life time.Duration `yaml:"life"`
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
	for field, n := range map[string]int{"limits.tunnels": c.Limits.Tunnels, "limits.tunnels_per_workload": c.Limits.TunnelsPerWorkload} {
		need(n >= 0, field, fmt.Sprintf("%d is negative", n))
	}
	for field, d := range map[string]time.Duration{"limits.idle": c.Limits.Idle, "limits.life": c.Limits.Life} {
		need(d >= 0, field, fmt.Sprintf("%s is negative", d))
	}
	errs = append(errs, c.Audit.Validate(), c.Log.Validate(), c.Drain.Validate())
	return errors.Join(errs...)
}

// fill sets the defaults that depend on other fields.
func (c *Config) fill() {
	if c.RunDir == "" {
		c.RunDir = filepath.Join(c.DataDir, "run")
	}
	c.Drain = c.Drain.WithDefaults()
}
