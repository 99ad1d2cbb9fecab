package main

import (
	"errors"
	"fmt"
	"time"

	"sallyport/internal/daemon"
	"sallyport/internal/stepca"
)

// UpstreamConfig says who signs our intermediate. docs/upstream-ca.md has what
// that authority must be told.
type UpstreamConfig struct {
	// Kind is "step-ca". Default: there is no upstream authority.
	Kind string `yaml:"kind"`
	// URL is that of step-ca: https://host:port.
	URL string `yaml:"url"`
	// Fingerprints are the SHA-256 of its roots in hex: of the present one, and
	// of the next one before it changes.
	Fingerprints []string `yaml:"fingerprints"`
	// Provisioner is the name of one of its JWK provisioners.
	Provisioner string `yaml:"provisioner"`
	// KeyFile is the private JWK of the provisioner, mode 0600.
	KeyFile string `yaml:"key_file"`
	// PasswordFile has the password of KeyFile in its first line, mode 0600.
	// Default: KeyFile is not encrypted.
	PasswordFile string `yaml:"password_file"`
}

func (u UpstreamConfig) client() stepca.Config {
	return stepca.Config{URL: u.URL, Fingerprints: u.Fingerprints, Provisioner: u.Provisioner}
}

// validateUpstream reports every mistake in ca.upstream, and what does not go
// together with it.
func (c *Config) validateUpstream() error {
	u := c.CA.Upstream
	var errs []error
	bad := func(field, what string) { errs = append(errs, fmt.Errorf("ca.upstream%s: %s", field, what)) }
	if u.Kind == "" {
		if u.URL != "" || len(u.Fingerprints) > 0 || u.Provisioner != "" || u.KeyFile != "" || u.PasswordFile != "" {
			bad(".kind", `missing; write "step-ca"`)
		}
		return errors.Join(errs...)
	}
	if u.Kind != "step-ca" {
		bad(".kind", fmt.Sprintf(`%q is not known; write "step-ca"`, u.Kind))
		return errors.Join(errs...)
	}
	if joined, ok := u.client().Validate().(interface{ Unwrap() []error }); ok {
		for _, err := range joined.Unwrap() {
			errs = append(errs, fmt.Errorf("ca.upstream.%w", err))
		}
	}
	if u.KeyFile == "" {
		bad(".key_file", "missing; write the file with the private JWK of the provisioner")
	}
	if c.CA.RootDir != "" {
		bad("", "the root is the upstream authority's, and ca.root_dir names one; leave out one of the two")
	}
	if c.Database.URL != "" {
		bad("", "issuers on one database share a root of their own; leave out one of ca.upstream and database.url")
	}
	return errors.Join(errs...)
}

// upstream opens what asks the upstream authority, nil without one.
func (c *Config) upstream() (*stepca.Client, error) {
	u := c.CA.Upstream
	if u.Kind == "" {
		return nil, nil
	}
	var password []byte
	if u.PasswordFile != "" {
		var err error
		if password, err = secretLine("ca.upstream.password_file", u.PasswordFile, "the password of ca.upstream.key_file"); err != nil {
			return nil, err
		}
	}
	conf := u.client()
	var err error
	if conf.Key, err = stepca.LoadKey(u.KeyFile, password); err != nil {
		return nil, fmt.Errorf("ca.upstream.key_file: %w", err)
	}
	return stepca.New(conf)
}

// onUpstream is ca.Config.OnUpstream. The issuer is ready while it can sign:
// until the intermediate that it has expires.
func (in *issuer) onUpstream(err error) {
	result := "ok"
	if err != nil {
		result = "failed"
	}
	in.metrics.UpstreamCA(result).Inc()
	if err != nil && in.ca != nil && time.Now().Before(in.ca.Status().IntermediateExpires) {
		err = nil
	}
	in.ready.Set("upstream", daemon.Hint(err, "no intermediate is valid: repair the way to the upstream authority"))
}
