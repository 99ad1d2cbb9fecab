package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/control"
	"sallyport/internal/daemon"
	"sallyport/internal/federation"
	"sallyport/internal/registry"
)

// FederationConfig is one other trust domain. Its bundle goes to the workloads
// whose entries name it in federates_with.
type FederationConfig struct {
	// TrustDomain is its name. Required.
	TrustDomain spiffeid.TrustDomain `yaml:"trust_domain"`
	// URL of its bundle endpoint, https. Required.
	URL string `yaml:"url"`
	// Profile is "https_web" (the system's certificate authorities vouch for
	// the host) or "https_spiffe" (the endpoint proves EndpointSPIFFEID).
	// Required.
	Profile string `yaml:"profile"`
	// EndpointSPIFFEID is what the endpoint proves. Required with https_spiffe.
	EndpointSPIFFEID spiffeid.ID `yaml:"endpoint_spiffe_id"`
	// Bundle is a file with its bundle in SPIFFE format, for the first contact.
	// Required with https_spiffe when the endpoint is of the same trust domain.
	// A file newer than what was last fetched replaces that at the start.
	Bundle string `yaml:"bundle"`
}

// relationships are the configuration in the room's form.
func (c *Config) relationships() []federation.Relationship {
	out := make([]federation.Relationship, len(c.Federation))
	for i, f := range c.Federation {
		out[i] = federation.Relationship{TrustDomain: f.TrustDomain, URL: f.URL, Profile: f.Profile, EndpointID: f.EndpointSPIFFEID}
	}
	return out
}

// validateFederation checks what needs no file.
func (c *Config) validateFederation() error {
	var errs []error
	for i, r := range c.relationships() {
		if err := r.Validate(); err != nil {
			errs = append(errs, fmt.Errorf("federation[%d]: %w", i, err))
		}
	}
	return errors.Join(errs...)
}

// keptBundle is the file of a bundle that was fetched.
func (in *issuer) keptBundle(td spiffeid.TrustDomain) string {
	return filepath.Join(in.cfg.DataDir, "federation", td.Name()+".json")
}

// openFederation knows the bundles of an earlier run, and of the operator.
func (in *issuer) openFederation() error {
	if err := os.MkdirAll(filepath.Join(in.cfg.DataDir, "federation"), 0o700); err != nil {
		return fmt.Errorf("keep federated bundles: %w", err)
	}
	start := map[spiffeid.TrustDomain]*federation.Bundle{}
	for i, f := range in.cfg.Federation {
		b, err := in.firstBundle(f)
		if err != nil {
			return daemon.Hint(fmt.Errorf("federation[%d].bundle: %w", i, err), "fetch the bundle document of "+f.TrustDomain.Name()+" anew")
		}
		if b != nil {
			start[f.TrustDomain] = b
		}
	}
	var err error
	in.follower, err = federation.NewFollower(federation.FollowerConfig{
		Relationships: in.cfg.relationships(), Own: in.cfg.TrustDomain, Start: start, Log: in.log,
		OwnBundle: func() *x509bundle.Bundle {
			return x509bundle.FromX509Authorities(in.cfg.TrustDomain, in.ca.Bundle().X509)
		},
		Save: func(td spiffeid.TrustDomain, doc []byte) error {
			return daemon.WriteFile(in.keptBundle(td), doc, 0o600)
		},
		OnFetch: func(td spiffeid.TrustDomain, good time.Time, err error) {
			result := "ok"
			if err != nil {
				result = "failed"
			}
			in.metrics.FederationFetches(td.Name(), result).Inc()
			if !good.IsZero() {
				in.metrics.FederationRefreshed(td.Name()).Set(float64(good.Unix()))
			}
		},
	})
	if err != nil {
		return daemon.Exit(daemon.Usage, err)
	}
	in.federations = &federations{in: in, applied: map[spiffeid.TrustDomain]registry.Federation{}}
	in.federations.apply()
	return nil
}

// firstBundle is the newer of the operator's file and the one last fetched;
// nil without both. A damaged copy of our own is fetched anew.
func (in *issuer) firstBundle(f FederationConfig) (*federation.Bundle, error) {
	var given *federation.Bundle
	var at time.Time
	if f.Bundle != "" {
		doc, err := os.ReadFile(f.Bundle)
		if err != nil {
			return nil, err
		}
		if given, err = federation.Decode(f.TrustDomain, doc); err != nil {
			return nil, err
		}
		if info, err := os.Stat(f.Bundle); err == nil {
			at = info.ModTime()
		}
	}
	if kept, when := in.lastFetched(f.TrustDomain); kept != nil && (given == nil || !at.After(when)) {
		return kept, nil
	}
	return given, nil
}

// lastFetched is the bundle that an earlier run or look has kept, and when; nil
// when there is none. A damaged one is fetched anew.
func (in *issuer) lastFetched(td spiffeid.TrustDomain) (*federation.Bundle, time.Time) {
	path := in.keptBundle(td)
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, time.Time{}
	}
	var doc []byte
	if err == nil {
		doc, err = os.ReadFile(path)
	}
	var kept *federation.Bundle
	if err == nil {
		kept, err = federation.Decode(td, doc)
	}
	if err != nil {
		in.log.Warn("kept bundle is of no use, fetching it anew", "file", path, "err", err)
		return nil, time.Time{}
	}
	return kept, info.ModTime()
}

// followFederation tells the proxies of each change, and follows what calls,
// here or at another issuer, made known.
func (in *issuer) followFederation(ctx context.Context) error {
	for {
		changed, calls := in.follower.Changed(), in.registry.FederationsChanged()
		in.federations.apply()
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
			in.server.SyncNow()
		case <-calls:
		}
	}
}

// federated is the bundle of another trust domain for the control server.
func (in *issuer) federated(td spiffeid.TrustDomain) (control.FederatedBundle, bool) {
	b := in.follower.Bundle(td)
	if b == nil {
		return control.FederatedBundle{}, false
	}
	out := control.FederatedBundle{X509: b.X509, RefreshHint: b.RefreshHint, Sequence: b.Sequence}
	for _, k := range b.JWT {
		out.JWT = append(out.JWT, control.JWTKey{KeyID: k.ID, PublicKey: k.Public})
	}
	return out, true
}

// federatedDomains are the trust domains whose bundle is held.
func (in *issuer) federatedDomains() []spiffeid.TrustDomain {
	return slices.Collect(maps.Keys(in.follower.Bundles()))
}
