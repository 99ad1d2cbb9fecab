package control

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"

	"sallyport/internal/control/meshpb"
	"sallyport/internal/mesh"
)

// ClientConfig configures a Client.
type ClientConfig struct {
	// Addresses of issuers, host:port, the preferred one first. Required.
	Addresses []string
	// TrustDomain that the issuer must serve. Required.
	TrustDomain spiffeid.TrustDomain
	// Bundle returns the roots that are trusted now: those of the bootstrap
	// file at first, then those the issuer has sent. Required.
	Bundle func() []*x509.Certificate
	// Identity returns the agent SVID, or nil before attestation. It is asked
	// at each call, so a renewed SVID is used at once. Required.
	Identity func() (*tls.Certificate, error)
	// Log receives changes of the connection. Required.
	Log *slog.Logger
	// Now is the clock. Default time.Now.
	Now func() time.Time
}

// Validate reports every mistake, by field.
func (c ClientConfig) Validate() error {
	var errs []error
	if len(c.Addresses) == 0 {
		errs = append(errs, errors.New("addresses: missing, want host:port"))
	}
	for _, a := range c.Addresses {
		if _, port, err := net.SplitHostPort(a); err != nil || port == "" {
			errs = append(errs, fmt.Errorf("addresses: %q is not host:port", a))
		}
	}
	missing := func(absent bool, field string) {
		if absent {
			errs = append(errs, fmt.Errorf("%s: missing", field))
		}
	}
	missing(c.TrustDomain.IsZero(), "trust_domain")
	missing(c.Bundle == nil, "bundle")
	missing(c.Identity == nil, "identity")
	missing(c.Log == nil, "log")
	return errors.Join(errs...)
}

// A Client speaks to the issuer for one agent. It is safe for concurrent use.
type Client struct {
	cfg ClientConfig
	// retryMin and retryMax bound the pause between attempts to connect.
	retryMin, retryMax time.Duration
	// alive is how often a subscriber repeats its last answer, look how often it
	// compares its SVID with that of the connection.
	alive, look time.Duration
	// unproved takes whoever answers for the issuer: Introduce's first question.
	unproved bool

	// mu guards what stands below it.
	mu     sync.Mutex
	link   *link
	closed bool
}

// Dial prepares a Client. It connects at the first call.
func Dial(cfg ClientConfig) (*Client, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("control client: %w", err)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Client{cfg: cfg, retryMin: retryMin, retryMax: retryMax, alive: alivePeriod, look: identityPeriod}, nil
}

// Close ends the connection and the calls on it.
func (c *Client) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	if c.link == nil {
		return nil
	}
	l := c.link
	c.link = nil
	close(l.stale)
	return l.cc.Close()
}

// ParseBundle reads the roots of a PEM bundle file.
func ParseBundle(text []byte) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for rest := text; ; {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			if len(bytes.TrimSpace(rest)) > 0 {
				return nil, errors.New("bundle: text that is no PEM block; want CERTIFICATE blocks only")
			}
			break
		}
		if b.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("bundle: PEM block %q; want CERTIFICATE blocks only", b.Type)
		}
		cert, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			return nil, fmt.Errorf("bundle: certificate %d: %w", len(out)+1, err)
		}
		if !cert.IsCA {
			return nil, fmt.Errorf("bundle: certificate %d is not a CA's", len(out)+1)
		}
		out = append(out, cert)
	}
	if len(out) == 0 {
		return nil, errors.New("bundle: no certificate; want the issuer's roots as PEM")
	}
	return out, nil
}

// An AgentSVID is what attestation gives.
type AgentSVID struct {
	ID    spiffeid.ID
	Chain []*x509.Certificate
}

// Attest proves this node by evidence of the kind that a node attestor checks,
// such as "join_token" with the token as payload, and has key certified. After
// a lost reply the same call with the same key succeeds within the issuer's
// grace window.
func (c *Client) Attest(ctx context.Context, kind string, payload []byte, key crypto.Signer) (AgentSVID, error) {
	return c.AttestAnswering(ctx, kind, payload, nil, key)
}

// AttestAnswering is Attest for evidence about which the issuer asks a
// question: answer gives what the node has to say to it.
func (c *Client) AttestAnswering(ctx context.Context, kind string, payload []byte, answer func(challenge []byte) ([]byte, error), key crypto.Signer) (AgentSVID, error) {
	csr, err := request(key)
	if err != nil {
		return AgentSVID{}, err
	}
	// An old agent SVID must not stand in the way: this connection shows none.
	l, err := c.open(nil)
	if err != nil {
		return AgentSVID{}, err
	}
	defer l.cc.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	st, err := agentv1.NewAgentClient(l.cc).AttestAgent(ctx)
	if err != nil {
		return AgentSVID{}, c.explain(ctx, "attest", l, err)
	}
	// The reply tells more than an error in sending.
	_ = st.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
		Data:   &types.AttestationData{Type: kind, Payload: payload},
		Params: &agentv1.AgentX509SVIDParams{Csr: csr},
	}}})
	for range maxChallenges {
		resp, err := st.Recv()
		if err != nil {
			return AgentSVID{}, c.explain(ctx, "attest", l, err)
		}
		challenge, ok := resp.GetStep().(*agentv1.AttestAgentResponse_Challenge)
		if !ok {
			return c.attested(resp, key)
		}
		if answer == nil {
			return AgentSVID{}, errors.New("attest: issuer asks for a challenge, which this kind of evidence does not answer")
		}
		a, err := answer(challenge.Challenge)
		if err != nil {
			return AgentSVID{}, fmt.Errorf("attest: answer the challenge: %w", err)
		}
		_ = st.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_ChallengeResponse{ChallengeResponse: a}})
	}
	return AgentSVID{}, fmt.Errorf("attest: issuer asks for more than %d challenges", maxChallenges-1)
}

func (c *Client) attested(resp *agentv1.AttestAgentResponse, key crypto.Signer) (AgentSVID, error) {
	if resp.GetResult() == nil {
		return AgentSVID{}, errors.New("attest: issuer answers with neither an SVID nor a challenge")
	}
	chain, err := chainFromWire(resp.GetResult().GetSvid(), spiffeid.ID{}, key.Public())
	if err != nil {
		return AgentSVID{}, fmt.Errorf("attest: %w", err)
	}
	id, err := leafID(chain[0])
	if err != nil {
		return AgentSVID{}, fmt.Errorf("attest: %w", err)
	}
	if !id.MemberOf(c.cfg.TrustDomain) || !strings.HasPrefix(id.Path(), agentPrefix) {
		return AgentSVID{}, fmt.Errorf("attest: issuer named this node %s, which is no agent of %s", id, c.cfg.TrustDomain)
	}
	return AgentSVID{ID: id, Chain: chain}, nil
}

// Renew has a new key certified for the agent. The present SVID stays good
// until the new one is used.
func (c *Client) Renew(ctx context.Context, key crypto.Signer) (AgentSVID, error) {
	csr, err := request(key)
	if err != nil {
		return AgentSVID{}, err
	}
	var out AgentSVID
	err = c.call(ctx, "renew agent SVID", func(l *link) error {
		resp, err := agentv1.NewAgentClient(l.cc).RenewAgent(ctx, &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: csr}})
		if err != nil {
			return err
		}
		leaf, err := x509.ParseCertificate(l.leaf)
		if err != nil {
			return fmt.Errorf("renew without an agent SVID: %w", ErrMustReattest)
		}
		if out.ID, err = leafID(leaf); err != nil {
			return err
		}
		out.Chain, err = chainFromWire(resp.GetSvid(), out.ID, key.Public())
		return err
	})
	return out, err
}

// SyncEntries returns all entries of this agent, sorted by ID.
func (c *Client) SyncEntries(ctx context.Context) ([]mesh.Entry, error) {
	var out []mesh.Entry
	err := c.call(ctx, "sync entries", func(l *link) error {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		wire, err := syncEntries(ctx, entryv1.NewEntryClient(l.cc))
		if err != nil {
			return err
		}
		out = make([]mesh.Entry, len(wire))
		for i, w := range wire {
			if out[i], err = entryFromWire(w); err != nil {
				return err
			}
		}
		return nil
	})
	slices.SortFunc(out, func(a, b mesh.Entry) int { return cmp.Compare(a.ID, b.ID) })
	return out, err
}

// syncEntries speaks the paging protocol of SPIRE, which sends revisions first
// when there are many entries.
func syncEntries(ctx context.Context, cl entryv1.EntryClient) ([]*types.Entry, error) {
	st, err := cl.SyncAuthorizedEntries(ctx)
	if err != nil {
		return nil, err
	}
	_ = st.Send(&entryv1.SyncAuthorizedEntriesRequest{})
	resp, err := st.Recv()
	if err != nil {
		return nil, err
	}
	if len(resp.GetEntryRevisions()) == 0 {
		entries := resp.GetEntries()
		for resp.GetMore() {
			if resp, err = st.Recv(); err != nil {
				return nil, err
			}
			entries = append(entries, resp.GetEntries()...)
		}
		return entries, st.CloseSend()
	}
	size := len(resp.GetEntryRevisions())
	var ids []string
	for {
		for _, r := range resp.GetEntryRevisions() {
			ids = append(ids, r.GetId())
		}
		if !resp.GetMore() {
			break
		}
		if resp, err = st.Recv(); err != nil {
			return nil, err
		}
	}
	var entries []*types.Entry
	for page := range slices.Chunk(ids, size) {
		_ = st.Send(&entryv1.SyncAuthorizedEntriesRequest{Ids: page})
		for more := true; more; more = resp.GetMore() {
			if resp, err = st.Recv(); err != nil {
				return nil, err
			}
			entries = append(entries, resp.GetEntries()...)
		}
	}
	return entries, st.CloseSend()
}

// An SVIDRequest asks for an X.509-SVID of an entry for a key.
type SVIDRequest struct {
	EntryID string
	// ID that the SVID must name.
	ID  spiffeid.ID
	Key crypto.Signer
}

// An SVIDResult has either a chain, leaf first and root absent, or an error.
type SVIDResult struct {
	Chain []*x509.Certificate
	Err   error
}

// NewX509SVIDs has SVIDs signed. The results stand in the order of the requests.
func (c *Client) NewX509SVIDs(ctx context.Context, reqs []SVIDRequest) ([]SVIDResult, error) {
	var out []SVIDResult
	for part := range slices.Chunk(reqs, maxBatch) {
		var params []*svidv1.NewX509SVIDParams
		for _, r := range part {
			csr, err := request(r.Key)
			if err != nil {
				return nil, err
			}
			params = append(params, &svidv1.NewX509SVIDParams{EntryId: r.EntryID, Csr: csr})
		}
		err := c.call(ctx, "get X.509-SVIDs", func(l *link) error {
			resp, err := svidv1.NewSVIDClient(l.cc).BatchNewX509SVID(ctx, &svidv1.BatchNewX509SVIDRequest{Params: params})
			if err != nil {
				return err
			}
			if len(resp.GetResults()) != len(part) {
				return fmt.Errorf("issuer returned %d SVIDs, want %d", len(resp.GetResults()), len(part))
			}
			for i, r := range resp.GetResults() {
				out = append(out, svidResult(r, part[i]))
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}

func svidResult(r *svidv1.BatchNewX509SVIDResponse_Result, want SVIDRequest) SVIDResult {
	switch code := codes.Code(r.GetStatus().GetCode()); code {
	case codes.OK:
		chain, err := chainFromWire(r.GetSvid(), want.ID, want.Key.Public())
		return SVIDResult{Chain: chain, Err: err}
	case codes.Internal, codes.Unavailable, codes.Unknown:
		return SVIDResult{Err: fmt.Errorf("get SVID of %s: %w: %s; see the issuer's log", want.ID, ErrFailed, plain(r.GetStatus().GetMessage()))}
	default:
		return SVIDResult{Err: fmt.Errorf("get SVID of %s: %w: %s", want.ID, ErrRefused, plain(r.GetStatus().GetMessage()))}
	}
}

// A JWTSVID is a token for a workload.
type JWTSVID struct {
	ID              spiffeid.ID
	Token           string
	Issued, Expires time.Time
}

// NewJWTSVID has a token signed for an entry and its audiences.
func (c *Client) NewJWTSVID(ctx context.Context, entryID string, audience []string) (JWTSVID, error) {
	var out JWTSVID
	err := c.call(ctx, "get JWT-SVID", func(l *link) error {
		resp, err := svidv1.NewSVIDClient(l.cc).NewJWTSVID(ctx, &svidv1.NewJWTSVIDRequest{EntryId: entryID, Audience: audience})
		if err != nil {
			return err
		}
		w := resp.GetSvid()
		if out.ID, err = idFromWire(w.GetId()); err != nil {
			return err
		}
		out.Token, out.Issued, out.Expires = w.GetToken(), time.Unix(w.GetIssuedAt(), 0), time.Unix(w.GetExpiresAt(), 0)
		return nil
	})
	return out, err
}

// A Bundle is what verifies the SVIDs of the trust domain.
type Bundle struct {
	X509 []*x509.Certificate
	// Tainted are those of X509 under which no SVID should be any more. They
	// are trusted until they leave the bundle.
	Tainted []*x509.Certificate
	JWT     []JWTKey
	// RefreshHint is how often to fetch it without a push.
	RefreshHint time.Duration
}

// GetBundle fetches the trust domain's bundle, tainted authorities too.
func (c *Client) GetBundle(ctx context.Context) (Bundle, error) {
	var out Bundle
	err := c.call(ctx, "get bundle", func(l *link) error {
		w, err := bundlev1.NewBundleClient(l.cc).GetBundle(ctx, &bundlev1.GetBundleRequest{})
		if err != nil {
			return err
		}
		out, err = bundleFromWire(w, c.cfg.TrustDomain)
		return err
	})
	return out, err
}

// edgeChunk is how many edges one report holds: below maxRequest by far.
const edgeChunk = 1000

// ReportEdges adds counts of calls from and to this agent's workloads.
func (c *Client) ReportEdges(ctx context.Context, edges []mesh.Edge) error {
	for part := range slices.Chunk(edges, edgeChunk) {
		r := &meshpb.EdgeReport{}
		for _, e := range part {
			r.Edges = append(r.Edges, edgeToWire(e))
		}
		if err := c.call(ctx, "report edges", func(l *link) error {
			_, err := meshpb.NewMeshClient(l.cc).ReportEdges(ctx, r)
			return err
		}); err != nil {
			return err
		}
	}
	return nil
}

// call runs fn on the present link and turns its error into a sentence.
func (c *Client) call(ctx context.Context, verb string, fn func(*link) error) error {
	l, err := c.acquire()
	if err != nil {
		return fmt.Errorf("%s: %w", verb, err)
	}
	defer c.release(l)
	return c.explain(ctx, verb, l, fn(l))
}

// request makes a certificate request that conveys a key and nothing else.
func request(key crypto.Signer) ([]byte, error) {
	if key == nil {
		return nil, errors.New("make certificate request: no key")
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, fmt.Errorf("make certificate request: %w", err)
	}
	return der, nil
}

func leafOf(cert *tls.Certificate) (*x509.Certificate, error) {
	if cert.Leaf != nil {
		return cert.Leaf, nil
	}
	if len(cert.Certificate) == 0 {
		return nil, errors.New("agent SVID has no certificate")
	}
	leaf, err := x509.ParseCertificate(cert.Certificate[0])
	if err != nil {
		return nil, fmt.Errorf("read agent SVID: %w", err)
	}
	return leaf, nil
}
