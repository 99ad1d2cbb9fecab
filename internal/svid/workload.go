package svid

import (
	"cmp"
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"time"

	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"

	"sallyport/internal/capture"
)

const (
	// recheckEvery is how soon a stream ends after its process became another
	// program without any SVID being sent.
	recheckEvery = 5 * time.Second
	// Bounds on what one request may ask.
	maxRequest   = 512 << 10 // bytes; an Envoy lists all its extensions in its first
	maxHeaders   = 16 << 10  // bytes
	maxAudiences = 16
	maxAudience  = 1024 // bytes each
	maxHint      = 1024 // bytes, SPIFFE Workload API section 5.2.1
)

// An Attestor says which identities a local process may have. It is asked
// before every message, so an answer holds for one message only. An error
// means that nothing could be established; no identity is an empty answer.
type Attestor interface {
	Attest(ctx context.Context, p capture.Process) (entryIDs []string, err error)
}

// A JWTMinter signs JWT-SVIDs for an entry. It limits their life itself.
type JWTMinter interface {
	MintJWT(ctx context.Context, entryID string, audience []string) (token string, err error)
}

// A Delivery is one answer of the Workload API, for the audit log.
type Delivery struct {
	Process capture.Process
	// Method is the name of the call, such as "FetchX509SVID".
	Method string
	// IDs are the identities that the caller was given, or, for a call that
	// gives none or only some, has; empty when refused.
	IDs []spiffeid.ID
	// Err is why it was refused, nil otherwise.
	Err error
}

// WorkloadConfig says what a WorkloadAPI serves, and to whom.
type WorkloadConfig struct {
	// Source holds the identities. Required.
	Source *Source
	// Attest decides which of them a caller gets. Required.
	Attest Attestor
	// JWT signs JWT-SVIDs. Without it FetchJWTSVID is Unimplemented.
	JWT JWTMinter
	// Audit records each answer before it is sent. When it fails, the answer
	// is not sent. Optional.
	Audit func(Delivery) error
	// Log receives refusals and panics. Required.
	Log *slog.Logger
	// MaxConns and MaxStreams bound what one process may hold open. Default 16
	// and 64. MaxTotal bounds the connections of all together, default 512; a
	// half of it is the most that the processes of one user may hold, so that
	// no user can lock the others out.
	MaxConns, MaxStreams, MaxTotal int

	patience time.Duration // with the answer to a challenge; tests set it
}

// Validate reports all mistakes at once.
func (c WorkloadConfig) Validate() error {
	var errs []error
	if c.Source == nil {
		errs = append(errs, errors.New("source: missing"))
	}
	if c.Attest == nil {
		errs = append(errs, errors.New("attest: missing"))
	}
	if c.Log == nil {
		errs = append(errs, errors.New("log: missing"))
	}
	for name, n := range map[string]int{"max_conns": c.MaxConns, "max_streams": c.MaxStreams, "max_total": c.MaxTotal} {
		if n < 0 {
			errs = append(errs, fmt.Errorf("%s: %d is negative", name, n))
		}
	}
	return errors.Join(errs...)
}

// A WorkloadAPI serves the SPIFFE Workload API, and Envoy's SDS v3 beside it,
// to local processes. Each caller
// is attested at accept and again before every message; a connection that is
// handed to another process, or whose process ends or becomes another program,
// is closed.
type WorkloadAPI struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	cfg WorkloadConfig

	mu      sync.Mutex // guards the counts
	conns   map[int]int
	streams map[int]int
	users   map[uint32]int
	total   int
}

// NewWorkloadAPI checks the configuration.
func NewWorkloadAPI(cfg WorkloadConfig) (*WorkloadAPI, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("workload API: %w", err)
	}
	cfg.MaxConns = cmp.Or(cfg.MaxConns, 16)
	cfg.MaxStreams = cmp.Or(cfg.MaxStreams, 64)
	cfg.MaxTotal = cmp.Or(cfg.MaxTotal, 512)
	cfg.patience = cmp.Or(cfg.patience, challengeTime)
	return &WorkloadAPI{cfg: cfg, conns: map[int]int{}, streams: map[int]int{}, users: map[uint32]int{}}, nil
}

// Serve answers on l, which capture.ListenUnix made, until ctx ends; then it
// closes every connection and returns nil. It closes l.
func (w *WorkloadAPI) Serve(ctx context.Context, l net.Listener) error {
	s := grpc.NewServer(
		grpc.Creds(&localPeers{w}),
		grpc.MaxRecvMsgSize(maxRequest),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.MaxConcurrentStreams(uint32(w.cfg.MaxStreams)),
		grpc.ConnectionTimeout(10*time.Second),
		grpc.WaitForHandlers(true), // what they record must not come after the end
		grpc.UnaryInterceptor(w.unary),
		grpc.StreamInterceptor(w.stream),
		grpc.WaitForHandlers(true), // each ends with its connection
	)
	workload.RegisterSpiffeWorkloadAPIServer(s, w)
	secretv3.RegisterSecretDiscoveryServiceServer(s, &sdsAPI{w: w})
	reflection.Register(s) // the specification says SHOULD
	// Streams have no end of their own, so there is no waiting for them.
	stop := context.AfterFunc(ctx, s.Stop)
	defer stop()
	if err := s.Serve(l); err != nil && ctx.Err() == nil {
		return fmt.Errorf("workload API: %w", err)
	}
	return nil
}

// A grant is what one caller may have at one moment.
type grant struct {
	state *State
	ids   []Identity
}

// attest looks at the caller anew and picks its identities from the current
// state; only narrows them to one unless it is zero. Every error is a gRPC
// status.
func (w *WorkloadAPI) attest(ctx context.Context, method string, only spiffeid.ID) (*grant, error) {
	p, err := peerOf(ctx)
	if err != nil {
		return nil, err
	}
	g, err := w.entitled(ctx, p, only)
	d := Delivery{Process: p.process, Method: method, Err: err}
	if g != nil {
		for _, id := range g.ids {
			d.IDs = append(d.IDs, id.ID)
		}
	}
	if w.cfg.Audit != nil {
		if aerr := w.cfg.Audit(d); aerr != nil {
			w.cfg.Log.Error("workload API: answer withheld, it could not be recorded", "error", aerr)
			return nil, status.Error(codes.Unavailable, "the answer could not be recorded")
		}
	}
	return g, err
}

func (w *WorkloadAPI) entitled(ctx context.Context, p *localPeer, only spiffeid.ID) (*grant, error) {
	if err := p.prove(ctx, w.cfg.patience); err != nil {
		w.cfg.Log.Warn("workload API: caller not proven", "pid", p.process.PID, "error", err)
		return nil, status.Error(codes.PermissionDenied, "the process that opened this connection does not answer on it")
	}
	if err := p.check(); err != nil {
		w.cfg.Log.Warn("workload API: caller changed", "pid", p.process.PID, "error", err)
		return nil, status.Error(codes.PermissionDenied, "the process that opened this connection has changed")
	}
	st := w.cfg.Source.Current()
	if st == nil {
		return nil, status.Error(codes.Unavailable, "no identity here yet: try again")
	}
	entries, err := w.cfg.Attest.Attest(ctx, p.process)
	if err != nil {
		w.cfg.Log.Warn("workload API: attestation failed", "pid", p.process.PID, "error", err)
		return nil, status.Error(codes.PermissionDenied, "attestation failed")
	}
	g := &grant{state: st}
	now := w.cfg.Source.now()
	for _, id := range st.Identities {
		if slices.Contains(entries, id.EntryID) && now.Before(id.Expires()) && (only.IsZero() || id.ID == only) {
			g.ids = append(g.ids, id)
		}
	}
	if len(g.ids) == 0 {
		return nil, status.Error(codes.PermissionDenied, "no identity issued")
	}
	if err := p.check(); err != nil { // Attest took time
		return nil, status.Error(codes.PermissionDenied, "the process that opened this connection has changed")
	}
	return g, nil
}

// federated are the bundles of other trust domains that the caller's entries
// name.
func (g *grant) federated() map[spiffeid.TrustDomain]*x509bundle.Bundle {
	out := map[spiffeid.TrustDomain]*x509bundle.Bundle{}
	for _, id := range g.ids {
		for _, td := range id.FederatesWith {
			if b := g.state.Federated[td]; b != nil {
				out[td] = b
			}
		}
	}
	return out
}

// follow sends the state at once and after each change, until the caller is
// gone or is no longer entitled.
func (w *WorkloadAPI) follow(ctx context.Context, method string, send func(*grant) error) error {
	p, err := peerOf(ctx)
	if err != nil {
		return err
	}
	tick := time.NewTicker(recheckEvery)
	defer tick.Stop()
	for {
		changed := w.cfg.Source.Changed()
		g, err := w.attest(ctx, method, spiffeid.ID{})
		if err != nil {
			return err
		}
		if err := send(g); err != nil {
			return err
		}
		for waiting := true; waiting; {
			select {
			case <-changed:
				waiting = false
			case <-tick.C:
				if err := p.check(); err != nil {
					return status.Error(codes.PermissionDenied, "the process that opened this connection has changed")
				}
			case <-p.pidfd.Done():
				return status.Error(codes.PermissionDenied, "the process that opened this connection has ended")
			case <-ctx.Done():
				return status.FromContextError(ctx.Err()).Err()
			}
		}
	}
}

// FetchX509SVID streams the caller's SVIDs with keys and bundles.
func (w *WorkloadAPI) FetchX509SVID(_ *workload.X509SVIDRequest, s workload.SpiffeWorkloadAPI_FetchX509SVIDServer) error {
	return w.follow(s.Context(), "FetchX509SVID", func(g *grant) error {
		resp := &workload.X509SVIDResponse{FederatedBundles: map[string][]byte{}}
		hints := map[string]bool{}
		for _, id := range g.ids {
			key, err := x509.MarshalPKCS8PrivateKey(id.Key)
			if err != nil {
				return status.Error(codes.Internal, "private key cannot be encoded")
			}
			resp.Svids = append(resp.Svids, &workload.X509SVID{
				SpiffeId: id.ID.String(), X509Svid: joinDER(id.Chain), X509SvidKey: key,
				Bundle: bundleDER(g.state.Bundle), Hint: uniqueHint(hints, id.Hint),
			})
		}
		for td, b := range g.federated() {
			resp.FederatedBundles[td.IDString()] = bundleDER(b)
		}
		return s.Send(resp)
	})
}

// uniqueHint keeps a hint for the first identity that has it.
func uniqueHint(used map[string]bool, hint string) string {
	if used[hint] || len(hint) > maxHint {
		return ""
	}
	used[hint] = true
	return hint
}

func joinDER(cs []*x509.Certificate) (out []byte) {
	for _, c := range cs {
		out = append(out, c.Raw...)
	}
	return out
}

func bundleDER(b *x509bundle.Bundle) []byte { return joinDER(b.X509Authorities()) }

// FetchX509Bundles streams the bundles that the caller may trust.
func (w *WorkloadAPI) FetchX509Bundles(_ *workload.X509BundlesRequest, s workload.SpiffeWorkloadAPI_FetchX509BundlesServer) error {
	return w.follow(s.Context(), "FetchX509Bundles", func(g *grant) error {
		resp := &workload.X509BundlesResponse{Bundles: map[string][]byte{
			g.state.Bundle.TrustDomain().IDString(): bundleDER(g.state.Bundle),
		}}
		for td, b := range g.federated() {
			resp.Bundles[td.IDString()] = bundleDER(b)
		}
		return s.Send(resp)
	})
}

// FetchJWTBundles streams the keys that verify JWT-SVIDs, as JWK sets.
func (w *WorkloadAPI) FetchJWTBundles(_ *workload.JWTBundlesRequest, s workload.SpiffeWorkloadAPI_FetchJWTBundlesServer) error {
	return w.follow(s.Context(), "FetchJWTBundles", func(g *grant) error {
		keys := map[spiffeid.TrustDomain]map[string]crypto.PublicKey{g.state.Bundle.TrustDomain(): g.state.JWTKeys}
		for td := range g.federated() {
			keys[td] = g.state.FederatedJWT[td]
		}
		resp := &workload.JWTBundlesResponse{Bundles: map[string][]byte{}}
		for td, k := range keys {
			doc, err := jwtbundle.FromJWTAuthorities(td, k).Marshal()
			if err != nil {
				return status.Error(codes.Internal, "JWT bundle cannot be encoded")
			}
			resp.Bundles[td.IDString()] = doc
		}
		return s.Send(resp)
	})
}

// FetchJWTSVID signs a token for each of the caller's identities, or for the
// one it names.
func (w *WorkloadAPI) FetchJWTSVID(ctx context.Context, r *workload.JWTSVIDRequest) (*workload.JWTSVIDResponse, error) {
	if w.cfg.JWT == nil {
		return nil, status.Error(codes.Unimplemented, "JWT-SVIDs are not served here")
	}
	if err := checkAudience(r.Audience); err != nil {
		return nil, err
	}
	var only spiffeid.ID
	if r.SpiffeId != "" {
		id, err := spiffeid.FromString(r.SpiffeId)
		if err != nil {
			return nil, status.Error(codes.InvalidArgument, "spiffe_id is not a SPIFFE ID")
		}
		only = id
	}
	g, err := w.attest(ctx, "FetchJWTSVID", only)
	if err != nil {
		return nil, err
	}
	resp, hints := &workload.JWTSVIDResponse{}, map[string]bool{}
	for _, id := range g.ids {
		token, err := w.cfg.JWT.MintJWT(ctx, id.EntryID, r.Audience)
		if err != nil {
			w.cfg.Log.Warn("workload API: JWT-SVID not signed", "id", id.ID, "error", err)
			return nil, status.Error(codes.Unavailable, "the issuer did not sign a JWT-SVID: try again")
		}
		resp.Svids = append(resp.Svids, &workload.JWTSVID{SpiffeId: id.ID.String(), Svid: token, Hint: uniqueHint(hints, id.Hint)})
	}
	p, err := peerOf(ctx)
	if err != nil {
		return nil, err
	}
	if err := p.check(); err != nil { // signing took time
		return nil, status.Error(codes.PermissionDenied, "the process that opened this connection has changed")
	}
	return resp, nil
}

func checkAudience(aud []string) error {
	if len(aud) == 0 || len(aud) > maxAudiences {
		return status.Errorf(codes.InvalidArgument, "%d audiences, want 1 to %d", len(aud), maxAudiences)
	}
	for _, a := range aud {
		if a == "" || len(a) > maxAudience {
			return status.Errorf(codes.InvalidArgument, "audience of %d bytes, want 1 to %d", len(a), maxAudience)
		}
	}
	return nil
}
