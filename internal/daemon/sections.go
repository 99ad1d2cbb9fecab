package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"sallyport/internal/telemetry"
)

// LogConfig is the section of a configuration about logs for the operator;
// decisions go to the audit log.
type LogConfig struct {
	// Level is debug, info, warn or error. Default info.
	Level string `yaml:"level"`
}

// Validate checks the level.
func (l LogConfig) Validate() error {
	if _, err := ParseLevel(l.Level); err != nil {
		return fmt.Errorf("log.level: %w", err)
	}
	return nil
}

// DrainConfig is the section that bounds an orderly stop.
type DrainConfig struct {
	// Wait is how long a process stays open after it says "not ready".
	Wait time.Duration `yaml:"wait"`
	// Timeout bounds what is in flight. Default 25 s.
	Timeout time.Duration `yaml:"timeout"`
	// Outbound is how long a sidecar keeps the way out open, once the way in is
	// closed, for an application that it has not started: until that has closed
	// its port and its connections, or until this is over. Default: Timeout.
	Outbound time.Duration `yaml:"outbound"`
	// Handover is how long a process may finish what it carries once another has
	// taken over from it. Default 10 min.
	Handover time.Duration `yaml:"handover"`
}

// Validate reports every mistake, by field.
func (d DrainConfig) Validate() error {
	var errs []error
	for _, f := range []struct {
		name string
		d    time.Duration
	}{{"wait", d.Wait}, {"timeout", d.Timeout}, {"outbound", d.Outbound}, {"handover", d.Handover}} {
		if f.d < 0 || f.d > 24*time.Hour {
			errs = append(errs, fmt.Errorf("drain.%s: %s is not between 0s and 24h", f.name, f.d))
		}
	}
	return errors.Join(errs...)
}

// WithDefaults fills what was left out.
func (d DrainConfig) WithDefaults() DrainConfig {
	d.Timeout = cmp.Or(d.Timeout, 25*time.Second)
	d.Outbound = cmp.Or(d.Outbound, d.Timeout)
	d.Handover = cmp.Or(d.Handover, 10*time.Minute)
	return d
}

// Pause waits for d, or until now ends.
func Pause(now context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-now.Done():
	case <-t.C:
	}
}

// MetricsConfig is the section about who may read the metrics over TCP. They are
// on the admin socket in any case.
type MetricsConfig struct {
	// Listen serves GET /metrics and nothing else in clear text: host:port, by
	// custom 127.0.0.1:9464. Default: nothing is served.
	Listen string `yaml:"listen"`
	// Anyone allows an address that is not on loopback. Metrics name services and
	// rules, and how often they are called; whoever reaches the port reads that.
	Anyone bool `yaml:"anyone"`
	// IstioNames serves the calls also under the names that Istio's metrics have,
	// for dashboards that know those. It takes about as much room again.
	IstioNames bool `yaml:"istio_names"`
	// Disabled has nothing counted at all. It is for measuring what that costs.
	Disabled bool `yaml:"disabled"`
}

// Registry makes what counts, for a program of a trust domain; nil when nothing
// does.
func (m MetricsConfig) Registry(trustDomain string) *telemetry.Registry {
	if m.Disabled {
		return nil
	}
	r := telemetry.NewRegistry().Home(trustDomain)
	if m.IstioNames {
		r.IstioNames()
	}
	return r
}

// Validate reports every mistake, by field.
func (m MetricsConfig) Validate() error {
	if m.Disabled && m.IstioNames {
		return errors.New("metrics.istio_names: metrics.disabled has nothing to serve; leave one of both out")
	}
	if m.Listen == "" {
		return nil
	}
	if m.Disabled {
		return errors.New("metrics.listen: metrics.disabled has nothing to serve; leave one of both out")
	}
	host, port, err := net.SplitHostPort(m.Listen)
	if err != nil || port == "" {
		return fmt.Errorf("metrics.listen: %q is no host:port, such as \"127.0.0.1:9464\"", m.Listen)
	}
	if a, err := netip.ParseAddr(host); !m.Anyone && (err != nil || !a.IsLoopback()) {
		return fmt.Errorf("metrics.listen: %s is not a loopback address; metrics are served in clear text, so write metrics.anyone: true if whoever reaches it may read them", m.Listen)
	}
	return nil
}
