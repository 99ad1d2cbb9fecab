package federation

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/svid"
)

// The profiles of SPIFFE Federation section 5.
const (
	ProfileWeb    = "https_web"
	ProfileSPIFFE = "https_spiffe"
)

const (
	// minRefresh is the shortest time between two looks, whatever the hint.
	minRefresh = time.Minute
	// defaultRefresh is that of SPIFFE Trust Domain and Bundle section 4.1.2
	// for a document without hint.
	defaultRefresh = 5 * time.Minute
	// maxRefresh keeps a wrong hint from freezing a relationship.
	maxRefresh = 24 * time.Hour
	// firstRetry doubles up to minRefresh while there is no bundle at all.
	firstRetry   = 2 * time.Second
	fetchTimeout = 20 * time.Second
	maxRedirects = 3
)

// A Relationship is one trust domain whose SVIDs are to be verified here. None
// of it is inferred from another part.
type Relationship struct {
	TrustDomain spiffeid.TrustDomain
	// URL of the bundle endpoint, https.
	URL string
	// Profile is ProfileWeb or ProfileSPIFFE.
	Profile string
	// EndpointID is the SPIFFE ID that the endpoint proves, for ProfileSPIFFE.
	EndpointID spiffeid.ID
}

// Validate reports every mistake, by field.
func (r Relationship) Validate() error {
	var errs []error
	if r.TrustDomain.IsZero() {
		errs = append(errs, errors.New("trust_domain: missing"))
	}
	if err := checkURL(r.URL); err != nil {
		errs = append(errs, fmt.Errorf("url: %w", err))
	}
	switch {
	case r.Profile != ProfileWeb && r.Profile != ProfileSPIFFE:
		errs = append(errs, fmt.Errorf("profile: %q is neither https_web nor https_spiffe", r.Profile))
	case r.Profile == ProfileSPIFFE && r.EndpointID.IsZero():
		errs = append(errs, errors.New(`endpoint_spiffe_id: missing; write the SPIFFE ID of the endpoint, such as "spiffe://other.example/spire/server"`))
	case r.Profile == ProfileSPIFFE && r.EndpointID.Path() == "":
		errs = append(errs, fmt.Errorf("endpoint_spiffe_id: %s names a trust domain, not an endpoint", r.EndpointID))
	case r.Profile == ProfileWeb && !r.EndpointID.IsZero():
		errs = append(errs, errors.New("endpoint_spiffe_id: has no meaning with https_web; remove it"))
	}
	return errors.Join(errs...)
}

// checkURL is the form of an endpoint, also of one that a redirect names.
func checkURL(s string) error {
	u, err := url.Parse(s)
	switch {
	case err != nil || u.Scheme != "https" || u.Hostname() == "":
		return errors.New(`missing or not an https URL; write it as "https://host:8444"`)
	case u.User != nil:
		return errors.New("has user information, which an endpoint URL must not have")
	}
	return nil
}

// FollowerConfig says whose bundles a Follower keeps.
type FollowerConfig struct {
	// Relationships at the start; Follow replaces them.
	Relationships []Relationship
	// Own is the trust domain here. Required. It cannot be followed.
	Own spiffeid.TrustDomain
	// OwnBundle verifies an endpoint that has an identity of this trust domain.
	// Required.
	OwnBundle func() *x509bundle.Bundle
	// Start holds bundles known before the first look: from files of the
	// operator, or what Save kept.
	Start map[spiffeid.TrustDomain]*Bundle
	// Save keeps a bundle document that is new, so that it is known after a
	// restart. An error is logged. Optional.
	Save func(spiffeid.TrustDomain, []byte) error
	// OnFetch is told of each look: when the newest good document came, and
	// why none came now. Optional.
	OnFetch func(td spiffeid.TrustDomain, good time.Time, err error)
	// WebRoots verify https_web endpoints. Default: those of the system.
	WebRoots *x509.CertPool
	// Log receives changes and failures. Required.
	Log *slog.Logger
}

// Validate reports every mistake, by field.
func (c FollowerConfig) Validate() error {
	var errs []error
	if c.Own.IsZero() || c.OwnBundle == nil || c.Log == nil {
		errs = append(errs, errors.New("own, own_bundle or log: missing"))
	}
	seen := map[spiffeid.TrustDomain]bool{}
	for i, r := range c.Relationships {
		if err := r.Validate(); err != nil {
			errs = append(errs, fmt.Errorf("federation[%d]: %w", i, err))
		}
		switch {
		case !r.TrustDomain.IsZero() && r.TrustDomain == c.Own:
			errs = append(errs, fmt.Errorf("federation[%d].trust_domain: %s is this trust domain", i, r.TrustDomain))
		case seen[r.TrustDomain]:
			errs = append(errs, fmt.Errorf("federation[%d].trust_domain: %s stands twice", i, r.TrustDomain))
		}
		seen[r.TrustDomain] = true
	}
	for i, r := range c.Relationships {
		td := r.EndpointID.TrustDomain()
		if r.Profile != ProfileSPIFFE || r.EndpointID.IsZero() || td == c.Own {
			continue
		}
		if td == r.TrustDomain && c.Start[td] == nil {
			errs = append(errs, fmt.Errorf("federation[%d].bundle: missing; write the file with the first bundle of %s, which proves its endpoint", i, td))
		} else if td != r.TrustDomain && !seen[td] {
			errs = append(errs, fmt.Errorf("federation[%d].endpoint_spiffe_id: is of %s, which is not federated: add it to federation", i, td))
		}
	}
	return errors.Join(errs...)
}

// A Follower keeps the bundles of other trust domains fresh. What it has stays
// while an endpoint does not answer. It is safe for concurrent use.
type Follower struct {
	cfg FollowerConfig
	now func() time.Time

	mu       sync.Mutex // guards what stands below
	followed []Relationship
	refollow chan struct{} // closed and replaced when followed is
	held     map[spiffeid.TrustDomain]*Bundle
	changed  chan struct{} // closed and replaced at each change of held
}

// NewFollower checks the configuration.
func NewFollower(cfg FollowerConfig) (*Follower, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	f := &Follower{
		cfg: cfg, now: time.Now, held: map[spiffeid.TrustDomain]*Bundle{}, changed: make(chan struct{}),
		followed: slices.Clone(cfg.Relationships), refollow: make(chan struct{}),
	}
	for _, r := range cfg.Relationships {
		if b := cfg.Start[r.TrustDomain]; b != nil {
			f.held[r.TrustDomain] = b
		}
	}
	return f, nil
}

// Bundle is the newest bundle of a trust domain, nil when there is none.
func (f *Follower) Bundle(td spiffeid.TrustDomain) *Bundle {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.held[td]
}

// Bundles are the newest of all. The map is the caller's.
func (f *Follower) Bundles() map[spiffeid.TrustDomain]*Bundle {
	f.mu.Lock()
	defer f.mu.Unlock()
	return maps.Clone(f.held)
}

// Changed is closed at the next change of a bundle.
func (f *Follower) Changed() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.changed
}

// Follow looks from now on at the endpoints of rs and at no others. Each is
// valid, and no trust domain stands there twice. Bundles that are held stay:
// Forget drops one.
func (f *Follower) Follow(rs []Relationship) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.followed = slices.Clone(rs)
	close(f.refollow)
	f.refollow = make(chan struct{})
}

// Hold makes b the bundle of its trust domain, whatever its sequence number: an
// operator gave it.
func (f *Follower) Hold(b *Bundle) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.put(b)
}

// Forget drops the bundle of a trust domain, whose SVIDs nobody verifies then.
func (f *Follower) Forget(td spiffeid.TrustDomain) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.held[td] == nil {
		return
	}
	delete(f.held, td)
	close(f.changed)
	f.changed = make(chan struct{})
}

// put holds b and wakes who waits for it. mu is held.
func (f *Follower) put(b *Bundle) {
	f.held[b.TrustDomain] = b
	close(f.changed)
	f.changed = make(chan struct{})
}

// Run looks at every endpoint that is followed as often as its document asks
// for, until ctx ends.
func (f *Follower) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	running := map[Relationship]context.CancelFunc{}
	for {
		f.mu.Lock()
		rs, again := f.followed, f.refollow
		f.mu.Unlock()
		for r, stop := range running {
			if !slices.Contains(rs, r) {
				stop()
				delete(running, r)
			}
		}
		for _, r := range rs {
			if running[r] == nil {
				one, stop := context.WithCancel(ctx)
				running[r] = stop
				wg.Go(func() { f.follow(one, r) })
			}
		}
		select {
		case <-ctx.Done():
			for _, stop := range running {
				stop()
			}
			return nil
		case <-again:
		}
	}
}

func (f *Follower) follow(ctx context.Context, r Relationship) {
	var good time.Time
	failures := 0
	for {
		err := f.Refresh(ctx, r)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			good, failures = f.now(), 0
		} else {
			failures++
			f.cfg.Log.Warn("federated bundle not refreshed, the last one stays", "trust_domain", r.TrustDomain.Name(), "err", err, "failures", failures)
		}
		if f.cfg.OnFetch != nil {
			f.cfg.OnFetch(r.TrustDomain, good, err)
		}
		t := time.NewTimer(f.pause(r.TrustDomain, failures))
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-t.C:
		}
	}
}

// pause is how long to wait for the next look: what the document asks for, but
// at least a minute; a minute after a failure. Up to a tenth is left off, so
// that many issuers do not look at once.
func (f *Follower) pause(td spiffeid.TrustDomain, failures int) time.Duration {
	d := defaultRefresh
	b := f.Bundle(td)
	if b != nil && b.RefreshHint > 0 {
		d = min(max(b.RefreshHint, minRefresh), maxRefresh)
	}
	if failures > 0 {
		d = minRefresh
	}
	if failures > 0 && b == nil {
		d = min(firstRetry<<min(failures, 6), minRefresh)
	}
	jitter := rand.N(d/10 + 1)
	if d <= minRefresh {
		return d + jitter
	}
	return d - jitter
}

// Refresh looks at one endpoint now.
func (f *Follower) Refresh(ctx context.Context, r Relationship) error {
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	doc, err := f.fetch(ctx, r)
	if err != nil {
		return fmt.Errorf("fetch %s: %w", r.URL, err)
	}
	b, err := Decode(r.TrustDomain, doc)
	if err != nil {
		return fmt.Errorf("fetch %s: %w", r.URL, err)
	}
	fresh, err := f.keep(r, b)
	if err != nil || !fresh {
		return err
	}
	f.cfg.Log.Info("federated bundle changed", "trust_domain", r.TrustDomain.Name(), "sequence", b.Sequence, "authorities", len(b.X509), "jwt_keys", len(b.JWT))
	if f.cfg.Save != nil {
		if err := f.cfg.Save(r.TrustDomain, doc); err != nil {
			f.cfg.Log.Error("federated bundle not kept on disk", "trust_domain", r.TrustDomain.Name(), "err", err)
		}
	}
	return nil
}

// keep makes b the newest, unless its endpoint is followed no more. A document with a lower sequence number is one from
// the past: somebody plays it back, or a cache does. One without number, which
// may be left out, is the newest by its arrival.
func (f *Follower) keep(r Relationship, b *Bundle) (fresh bool, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !slices.Contains(f.followed, r) {
		return false, fmt.Errorf("%s is followed no more at %s", r.TrustDomain, r.URL)
	}
	old := f.held[b.TrustDomain]
	if old != nil {
		if b.Sequence != 0 && b.Sequence < old.Sequence {
			return false, fmt.Errorf("bundle of %s: sequence %d is lower than %d, which is already known", b.TrustDomain, b.Sequence, old.Sequence)
		}
		was, werr := old.Encode()
		now, nerr := b.Encode()
		if werr == nil && nerr == nil && bytes.Equal(was, now) {
			return false, nil
		}
	}
	f.put(b)
	return true, nil
}

func (f *Follower) fetch(ctx context.Context, r Relationship) ([]byte, error) {
	tr := &http.Transport{
		TLSClientConfig: f.clientTLS(r), ForceAttemptHTTP2: true, DisableKeepAlives: true,
		TLSHandshakeTimeout: 10 * time.Second, MaxResponseHeaderBytes: 64 << 10, Proxy: http.ProxyFromEnvironment,
	}
	c := &http.Client{Transport: tr, CheckRedirect: func(req *http.Request, via []*http.Request) error {
		if len(via) > maxRedirects {
			return fmt.Errorf("more than %d redirects", maxRedirects)
		}
		if err := checkURL(req.URL.String()); err != nil {
			return fmt.Errorf("redirect to %s: %w", req.URL.Redacted(), err)
		}
		return nil
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, r.URL, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/json")
	resp, err := c.Do(req)
	if err != nil {
		var ue *url.Error
		if errors.As(err, &ue) {
			err = ue.Err // it repeats the URL
		}
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("the endpoint answers %s", resp.Status)
	}
	doc, err := io.ReadAll(io.LimitReader(resp.Body, MaxDocument+1))
	if err == nil && len(doc) > MaxDocument {
		err = fmt.Errorf("the document has more than %d bytes", MaxDocument)
	}
	return doc, err
}

// clientTLS checks the endpoint as its profile says, also behind a redirect. It
// shows no certificate: the endpoint is public.
func (f *Follower) clientTLS(r Relationship) *tls.Config {
	c := &tls.Config{MinVersion: tls.VersionTLS12, CipherSuites: intermediate(), RootCAs: f.cfg.WebRoots}
	if r.Profile == ProfileWeb {
		return c
	}
	c.SessionTicketsDisabled = true
	c.InsecureSkipVerify = true // the name is a SPIFFE ID: VerifyConnection checks it
	c.VerifyConnection = func(cs tls.ConnectionState) error {
		b := f.authority(r.EndpointID.TrustDomain())
		if b == nil {
			return fmt.Errorf("no bundle of %s yet to verify the endpoint with", r.EndpointID.TrustDomain())
		}
		id, err := svid.VerifyChain(cs.PeerCertificates, b, f.now())
		if err != nil {
			return err
		}
		if id != r.EndpointID {
			return fmt.Errorf("the endpoint proves to be %s, want %s", id, r.EndpointID)
		}
		return nil
	}
	return c
}

// authority is the latest bundle of the endpoint's trust domain.
func (f *Follower) authority(td spiffeid.TrustDomain) *x509bundle.Bundle {
	if td == f.cfg.Own {
		return f.cfg.OwnBundle()
	}
	if b := f.Bundle(td); b != nil {
		return b.X509Bundle()
	}
	return nil
}
