package main

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/attest"
	"sallyport/internal/ca"
	"sallyport/internal/daemon"
	"sallyport/internal/sink"
)

// Config is the manual of the issuer. It is read from one YAML file; the
// environment (SALLYPORT_DATA_DIR, SALLYPORT_LOG_LEVEL, ...) goes before the
// file, and a flag before both.
type Config struct {
	// TrustDomain is the name of the trust domain, such as "corp.example".
	// It can't be changed later. Required.
	TrustDomain spiffeid.TrustDomain `yaml:"trust_domain"`
	// DataDir keeps the CA keys (ca/), the database (issuer.db), the audit logs
	// (audit/) and bundle.pem, the roots that proxies need for the first
	// contact. Mode 0700. Required.
	DataDir string `yaml:"data_dir"`
	// RunDir holds admin.sock and api.sock. Mode 0700. Default: "run" inside
	// DataDir.
	RunDir string `yaml:"run_dir"`
	// Listen is the API for proxies: host:port, by custom port 8443. Required.
	Listen string `yaml:"listen"`
	// Policies is the folder of reviewed policy files. An edit is taken within
	// a second; one with a mistake is refused and the last good stays. Required,
	// unless policies are pushed.
	Policies string `yaml:"policies"`
	// Policy says how policies reach the issuer. Default: by that folder.
	Policy PolicyConfig `yaml:"policy"`

	// Attestors are the kinds of node evidence that are accepted beside join
	// tokens. Default: none.
	Attestors attest.Config `yaml:"attestors"`

	// Endpoints says where the endpoints of services may stand.
	Endpoints EndpointsConfig `yaml:"endpoints"`

	// OIDC and BundleEndpoint publish the keys that verify our SVIDs.
	OIDC           OIDCConfig           `yaml:"oidc"`
	BundleEndpoint BundleEndpointConfig `yaml:"bundle_endpoint"`
	// Federation are the trust domains whose SVIDs our workloads may verify.
	Federation []FederationConfig `yaml:"federation"`

	// Page is what the operator looks at in a browser. Default: there is none.
	Page PageConfig `yaml:"page"`

	// Database is PostgreSQL, for several issuers at once. Default: SQLite in
	// DataDir, for one.
	Database DatabaseConfig `yaml:"database"`

	CA      CAConfig           `yaml:"ca"`
	Audit   sink.ListConfig    `yaml:"audit"`
	Log     daemon.LogConfig   `yaml:"log"`
	Metrics sink.MetricsConfig `yaml:"metrics"`

	// Pprof serves profiles on the admin socket: what the process spends time and
	// memory on. Default: no; the flag --pprof sets it.
	Pprof bool `yaml:"pprof"`
}

// EndpointsConfig bounds the addresses that proxies announce: callers are sent
// there.
type EndpointsConfig struct {
	// Allow are the networks, as prefixes, in which a proxy may announce an
	// address that is not the one its connection to this issuer comes from: for
	// machines with several addresses, and for those behind address translation
	// or a load balancer. It allows no loopback address. Default: none.
	Allow []netip.Prefix `yaml:"allow"`
}

func (c EndpointsConfig) validate() error {
	var errs []error
	for i, p := range c.Allow {
		switch {
		case p.Addr().Is4In6():
			errs = append(errs, fmt.Errorf("endpoints.allow[%d]: %s is a range of IPv4 in the form of IPv6; write it as IPv4, such as 10.1.0.0/16", i, p))
		case p != p.Masked():
			errs = append(errs, fmt.Errorf("endpoints.allow[%d]: %s has bits set behind its length; write %s", i, p, p.Masked()))
		}
	}
	return errors.Join(errs...)
}

// DatabaseConfig says where state is that several issuers share.
type DatabaseConfig struct {
	// URL names a PostgreSQL database that is there already:
	// postgres://user:password@host:5432/name?sslmode=verify-full. The
	// environment is the place for it: SALLYPORT_DATABASE_URL.
	URL string `yaml:"url" secret:"true"`
}

// CAConfig is about what is signed and for how long.
type CAConfig struct {
	// RootDir has root.crt and root.key from the directory ca of the first
	// issuer, mode 0700. An issuer that joins a database needs it for its first
	// start; afterwards it may go. Default: a root of its own.
	RootDir string `yaml:"root_dir"`
	// PassphraseFile holds the passphrase that encrypts the CA keys at rest.
	// Without it the keys are plain PKCS#8, mode 0600.
	PassphraseFile string `yaml:"passphrase_file"`
	// KMS says where the CA keys are: another directory (softkms:path=/dir), or
	// a PKCS#11 token that they never leave
	// (pkcs11:module-path=/hsm.so;token=NAME?pin-source=/file). Default: files
	// in DataDir. Such a URI may hold a PIN, so it is not shown.
	KMS string `yaml:"kms" secret:"true"`
	// Upstream is the authority that signs our intermediate. Default: a root of
	// our own.
	Upstream UpstreamConfig `yaml:"upstream"`
	// X509TTL is the life of an X.509-SVID. Default 1 h, at least 1 min.
	X509TTL time.Duration `yaml:"x509_ttl"`
	// JWTTTL is the life of a JWT-SVID. Default 5 min.
	JWTTTL time.Duration `yaml:"jwt_ttl"`
	// AgentTTL is the life of a node's own SVID. Default 1 h.
	AgentTTL time.Duration `yaml:"agent_ttl"`
	// AllowShortTTL permits lives down to 1 s, for demonstrations and tests.
	AllowShortTTL bool `yaml:"allow_short_ttl"`
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
	need(c.DataDir != "", "data_dir", `missing; write a directory of the issuer's own, such as "/var/lib/sallyport/issuer"`)
	need(c.Listen != "", "listen", `missing; write host:port, such as "0.0.0.0:8443"`)
	floor := time.Minute
	if c.CA.AllowShortTTL {
		floor = time.Second
	}
	for _, t := range []struct {
		field string
		d     time.Duration
	}{{"ca.x509_ttl", c.CA.X509TTL}, {"ca.jwt_ttl", c.CA.JWTTTL}, {"ca.agent_ttl", c.CA.AgentTTL}} {
		need(t.d == 0 || t.d >= floor, t.field, fmt.Sprintf("%s is too short; write at least %s", t.d, floor))
	}
	errs = append(errs, c.Audit.Validate(), c.Log.Validate(), c.Metrics.Validate())
	keys := ca.Config{Dir: c.DataDir, RootDir: c.CA.RootDir, KMS: c.CA.KMS, SharedRoot: c.Database.URL != "", Passphrase: []byte(c.CA.PassphraseFile)}
	if err := keys.CheckKMS(); err != nil {
		errs = append(errs, fmt.Errorf("ca.kms: %w", err))
	}
	errs = append(errs, c.validateUpstream())
	errs = append(errs, c.Attestors.Validate(), c.Endpoints.validate(), c.validatePolicy())
	errs = append(errs, c.validatePublic(), c.validateFederation(), c.Page.validate())
	return errors.Join(errs...)
}

// fill sets the defaults.
func (c *Config) fill() {
	if c.RunDir == "" {
		c.RunDir = filepath.Join(c.DataDir, "run")
	}
	if c.CA.X509TTL == 0 {
		c.CA.X509TTL = time.Hour
	}
	if c.CA.JWTTTL == 0 {
		c.CA.JWTTTL = 5 * time.Minute
	}
	if c.CA.AgentTTL == 0 {
		c.CA.AgentTTL = time.Hour
	}
}
