package control

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"

	"sallyport/internal/control/meshpb"
	"sallyport/internal/mesh"
)

// A Registry is what the issuer knows and distributes. All methods are safe for
// concurrent use.
type Registry interface {
	// EntriesFor returns the entries whose parent is agent or an alias of it, and
	// those below them; Entries, all.
	EntriesFor(agent spiffeid.ID) []mesh.Entry
	Entries() []mesh.Entry
	// CreateToken makes a single-use join token for an agent name.
	CreateToken(ctx context.Context, agentName string, ttl time.Duration) (token string, expires time.Time, err error)
	// PutAgent is durable when it returns. Its error wraps mesh.ErrChanged when
	// the agent is not at its Revision any more. GetAgent returns mesh.ErrNotFound
	// for an agent that was never attested.
	PutAgent(ctx context.Context, a mesh.Agent) error
	GetAgent(ctx context.Context, id spiffeid.ID) (mesh.Agent, error)
	// HeldAgent is GetAgent at the price of a look into memory.
	HeldAgent(ctx context.Context, id spiffeid.ID) (mesh.Agent, error)
	ListAgents(ctx context.Context) ([]mesh.Agent, error)
	// RecordIssued is durable when it returns. Changed is closed when
	// Revocations has another answer.
	RecordIssued(ctx context.Context, list []mesh.Issued) error
	Revocations() *mesh.RevokedSVIDs
	// FaultStops are never nil. Changed is closed when they have another answer.
	// StopFaults adds one, durable when it returns with its revision.
	FaultStops() *mesh.FaultStops
	StopFaults(ctx context.Context, s mesh.FaultStop) (revision uint64, err error)
	// Issuers is how many share this registry, at least 1.
	Issuers() int
	// Current is nil before the first policy.
	Current() *mesh.Snapshot
	// SnapshotFor is what a proxy is to act on, and whether that is what its
	// canary group tries: Current otherwise.
	SnapshotFor(agent, workload spiffeid.ID, kind string) (s *mesh.Snapshot, canary bool)
	// Changed is closed at the next change of Current or Entries.
	Changed() <-chan struct{}
	// Announce keeps an endpoint for the lease, counted from now; announcing
	// it again extends the lease and changes nothing else.
	Announce(ctx context.Context, e mesh.Endpoint, lease time.Duration) error
	// Withdraw marks the agent's endpoints to expire after their lease.
	Withdraw(ctx context.Context, agent spiffeid.ID) error
	// ReportProxy keeps what a proxy says. A report with State Rejected refuses
	// its PolicyRevision; any other acknowledges it, and the registry computes
	// the State.
	ReportProxy(p mesh.Proxy)
	Proxies() []mesh.Proxy
	// AddEdges adds what the proxies of an agent counted.
	AddEdges(agent spiffeid.ID, edges []mesh.Edge)
	Status() mesh.IssuerStatus
}

// An Authority signs. It checks what it signs; the Server has checked who asks.
// All methods are safe for concurrent use.
type Authority interface {
	// SignX509 returns the leaf and the intermediates, not the root. A ttl of
	// zero is the issuer's default.
	SignX509(ctx context.Context, id spiffeid.ID, key crypto.PublicKey, ttl time.Duration, dns []string) ([]*x509.Certificate, error)
	SignAgent(ctx context.Context, id spiffeid.ID, key crypto.PublicKey) ([]*x509.Certificate, error)
	SignJWT(ctx context.Context, id spiffeid.ID, audience []string, ttl time.Duration) (token string, issued, expires time.Time, err error)
	X509Bundle() []*x509.Certificate
	JWTKeys() []JWTKey
	// ServerCertificate proves ServerID; the implementation renews it.
	ServerCertificate() (*tls.Certificate, error)
}

// A JWTKey verifies JWT-SVIDs of the trust domain.
type JWTKey struct {
	KeyID     string
	PublicKey crypto.PublicKey
	ExpiresAt time.Time
	// Tainted says that tokens by this key should be fetched anew.
	Tainted bool
}

// A NodeVerifier checks the evidence of one kind of node attestation, given the
// key that the node asks to have certified. It names the agent.
type NodeVerifier interface {
	Verify(ctx context.Context, payload []byte, key crypto.PublicKey) (agent spiffeid.ID, selectors []mesh.Selector, err error)
}

// A Challenger is a NodeVerifier whose evidence proves something only together
// with the answer to a fresh question, so it may be shown again, unless it has
// a method Once that says true. ask sends the question and returns the answer;
// its error ends the attestation.
type Challenger interface {
	NodeVerifier
	VerifyAnswer(ctx context.Context, payload []byte, key crypto.PublicKey, ask func(challenge []byte) (answer []byte, err error)) (agent spiffeid.ID, selectors []mesh.Selector, err error)
}

// An AuditSink keeps the audit lines of proxies, durably when it returns. It
// must bear to receive a line twice.
type AuditSink interface {
	// Receive is called with the agent that sends and the workload whose proxy
	// wrote the lines: proxies of one workload on two nodes have two logs.
	Receive(ctx context.Context, agent, workload spiffeid.ID, lines [][]byte) error
}

// A Witness signs checkpoints of the audit logs of proxies, and remembers what
// it signed.
type Witness interface {
	Cosign(ctx context.Context, agent, workload spiffeid.ID, q CosignRequest) (CosignReply, error)
	// Heads returns the keys of those who sign, and what was signed last.
	Heads(ctx context.Context) (AuditHeads, error)
}

// An Attestation is one attempt to attest, for the audit.
type Attestation struct {
	// Agent is zero when the evidence named none.
	Agent spiffeid.ID
	Type  string
	// Peer is the remote address.
	Peer string
	// Refusal is empty when the agent was admitted.
	Refusal Refusal
}

// ServerConfig configures a Server.
type ServerConfig struct {
	// TrustDomain of this issuer. Required.
	TrustDomain spiffeid.TrustDomain
	// Registry, Authority and Audit are the issuer's rooms. Required.
	Registry  Registry
	Authority Authority
	Audit     AuditSink
	// Witness cosigns audit logs. Default: nobody does.
	Witness Witness
	// Explain explains a decision of a proxy, by its id, as JSON; an error that
	// wraps mesh.ErrNotFound says where else to look. Default: nobody can.
	Explain func(ctx context.Context, id string) ([]byte, error)
	// Chart says who called whom from one time to another. Default: nobody can.
	Chart func(ctx context.Context, from, to time.Time) (mesh.Chart, error)
	// PageLink makes a link that opens the page once. Default: there is none.
	PageLink func(ctx context.Context) (link string, expires time.Time, err error)
	// Roots lets the operator replace the root. Default: nobody can.
	Roots RootKeeper
	// Downstream serves issuers below this one. Default: there are none.
	Downstream Downstream
	// Verifiers by the name of the node attestor, such as "join_token".
	Verifiers map[string]NodeVerifier
	// Federated gives the bundle of another trust domain, false when there is
	// none. Default: there is never one.
	Federated func(spiffeid.TrustDomain) (FederatedBundle, bool)
	// FederatedDomains are the trust domains that Federated knows. Default none.
	FederatedDomains func() []spiffeid.TrustDomain
	// Federator lets operators federate by calls. Default: nobody can.
	Federator Federator
	// Why names the reason in a Verifier's error. RefusalNone says that the
	// verifier itself failed: the node may try again. Default: every error is
	// RefusalEvidence.
	Why func(error) Refusal
	// OnAttest is told of each attestation, before its answer. An error
	// refuses it: what cannot be recorded does not happen. Default none.
	OnAttest func(context.Context, Attestation) error
	// Endpoints are where a proxy may announce an endpoint though its connection
	// does not come from there. Default: nowhere.
	Endpoints []netip.Prefix
	// OnAnnounce is told of each endpoint that is refused for its address, before
	// its proxy is. Default none.
	OnAnnounce func(context.Context, Announcement) error
	// OnToken is told of each join token that the operator makes, and who it
	// was by, before the token is given out. An error withholds it. Default
	// none.
	OnToken func(ctx context.Context, agent spiffeid.ID, expires time.Time, by string) error
	// Keeper changes what operators change by calls. Default: such calls are
	// refused.
	Keeper Keeper
	// Policies takes policies that are pushed. Default: such calls are refused.
	Policies PolicyKeeper
	// Rollouts looks after the rollouts of routes. Default: there are none.
	Rollouts RolloutKeeper
	// SetFile gives out a signed set by its hash, mesh.ErrNotFound when it is none
	// of the last in force. The Server does not change it. Default: none is.
	SetFile func(hash string) ([]byte, error)
	// Admins makes an operator's right finer. Default: as SPIRE has it.
	Admins AdminJudge
	// OnAdmin is told of each operator's call before it is made, and of each
	// identity that it changes. An error refuses it. Default none.
	OnAdmin func(context.Context, AdminCall) error
	// OnMessage is told of each message of a caller, by the full name of its
	// method: of those over mutual TLS only. Default none.
	OnMessage func(method string)
	// OnCall is told of each plain call of a caller that was answered, by the full
	// name of its method, with the code of gRPC that it got and how long it took. Default none.
	OnCall func(method string, code uint32, took time.Duration)
	// Alone says that nobody else writes to what the Registry keeps, so that
	// HeldAgent is always true. Default: other issuers may.
	Alone bool
	// StreamsPerAgent bounds the streams one agent has open. Default 16.
	StreamsPerAgent int
	// AttestsAtOnce bounds the attestations that are judged at once. Default 64.
	AttestsAtOnce int
	// Log receives what an operator needs to know. Required.
	Log *slog.Logger
	// Now is the clock. Default time.Now.
	Now func() time.Time
}

// Validate reports every mistake, by field.
func (c ServerConfig) Validate() error {
	var errs []error
	missing := func(absent bool, field string) {
		if absent {
			errs = append(errs, fmt.Errorf("%s: missing", field))
		}
	}
	missing(c.TrustDomain.IsZero(), "trust_domain")
	missing(c.Registry == nil, "registry")
	missing(c.Authority == nil, "authority")
	missing(c.Audit == nil, "audit")
	missing(c.Log == nil, "log")
	if c.StreamsPerAgent < 0 {
		errs = append(errs, fmt.Errorf("streams_per_agent: %d is negative", c.StreamsPerAgent))
	}
	if c.AttestsAtOnce < 0 {
		errs = append(errs, fmt.Errorf("attests_at_once: %d is negative", c.AttestsAtOnce))
	}
	return errors.Join(errs...)
}

// A Server answers agents over mutual TLS and the operator over a Unix socket.
type Server struct {
	cfg    ServerConfig
	health *health.Server
	// attests holds one token for each attestation that is judged.
	attests chan struct{}
	// conns and strangers count by address, agentCalls, streams and shown by agent.
	conns, strangers, agentCalls, streams, shown tally
	refusals, work, uploads                      budgets

	// projections are of the snapshot of the fleet, tried of that of a canary
	// group.
	projections, tried projections
	demands            demands
	trusted            atomic.Pointer[trusted]
	revisions          entryRevisions
	// stopping is closed once the Server is to end its streams.
	stopping chan struct{}
	stopOnce sync.Once
	// machine reads the addresses of the issuer's own machine.
	machine func() ([]netip.Addr, error)
	// lease of an announced endpoint; hello bounds the wait for the first
	// message of a stream.
	lease, hello time.Duration
	// agents serialises changes of one agent's record.
	agents    keyedLocks
	evictions evictions
	looks     looks

	// mu guards what stands below it. It is taken after a lock of agents.
	mu sync.Mutex
	// subs counts the subscriptions of each proxy, live those of each agent. newest
	// has the last one of each proxy.
	subs   map[subscriber]int
	live   map[spiffeid.ID]int
	newest map[subscriber]*subscription
	// syncNow is closed and replaced when every proxy should sync; syncs counts
	// how often that was.
	syncNow chan struct{}
	syncs   uint64
}

// NewServer returns a Server that serves nothing yet.
func NewServer(cfg ServerConfig) (*Server, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("control server: %w", err)
	}
	if cfg.StreamsPerAgent == 0 {
		cfg.StreamsPerAgent = 16
	}
	if cfg.AttestsAtOnce == 0 {
		cfg.AttestsAtOnce = 64
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.OnMessage == nil {
		cfg.OnMessage = func(string) {}
	}
	if cfg.OnCall == nil {
		cfg.OnCall = func(string, uint32, time.Duration) {}
	}
	if cfg.Why == nil {
		cfg.Why = func(error) Refusal { return RefusalEvidence }
	}
	return &Server{
		cfg:      cfg,
		health:   health.NewServer(),
		attests:  make(chan struct{}, cfg.AttestsAtOnce),
		refusals: budgets{rate: refusalRate, burst: refusalBurst},
		work:     budgets{rate: workRate, burst: workBurst},
		uploads:  budgets{rate: uploadRate, burst: uploadBurst},
		stopping: make(chan struct{}),
		machine:  machineAddresses,
		lease:    endpointLease,
		hello:    helloTimeout,
		subs:     map[subscriber]int{},
		live:     map[spiffeid.ID]int{},
		newest:   map[subscriber]*subscription{},
		syncNow:  make(chan struct{}),
	}, nil
}

// Serve answers agents on l until ctx ends, then ends streams and waits for
// calls in flight. It closes l.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	g := grpc.NewServer(append(s.options(),
		grpc.ForceServerCodecV2(newCodec()),
		grpc.Creds(&doorCreds{credentials.NewTLS(s.tlsConfig()), &s.conns, strangerConns}),
		grpc.InTapHandle(s.tap),
		grpc.ChainUnaryInterceptor(s.countUnary, s.recoverUnary, s.guardUnary),
		grpc.ChainStreamInterceptor(s.recoverStream, s.countStream, s.guardStream))...)
	agentv1.RegisterAgentServer(g, &agentAPI{s: s})
	bundlev1.RegisterBundleServer(g, &bundleAPI{s: s})
	entryv1.RegisterEntryServer(g, &entryAPI{s: s})
	svidv1.RegisterSVIDServer(g, &svidAPI{s: s})
	trustdomainv1.RegisterTrustDomainServer(g, &trustDomainAPI{s: s})
	localauthorityv1.RegisterLocalAuthorityServer(g, &localAuthorityAPI{s: s})
	meshpb.RegisterMeshServer(g, &meshAPI{s: s})
	g.RegisterService(remoteAdmin(), &adminAPI{s: s})
	healthpb.RegisterHealthServer(g, s.health)
	return s.serve(ctx, g, l)
}

// ServeAdmin answers the operator on l, a Unix socket, until ctx ends. Only
// this process's own user and root are served.
func (s *Server) ServeAdmin(ctx context.Context, l *net.UnixListener) error {
	g := grpc.NewServer(append(s.options(),
		grpc.MaxSendMsgSize(maxAdminMessage),
		grpc.MaxRecvMsgSize(maxAdminMessage), // a set that is pushed; the caller is our own user
		grpc.ChainUnaryInterceptor(s.recoverUnary, s.guardLocalUnary),
		grpc.ChainStreamInterceptor(s.recoverStream, s.guardLocalStream))...)
	meshpb.RegisterAdminServer(g, &adminAPI{s: s})
	agentv1.RegisterAgentServer(g, &agentAPI{s: s})
	bundlev1.RegisterBundleServer(g, &bundleAPI{s: s})
	entryv1.RegisterEntryServer(g, &entryAPI{s: s})
	svidv1.RegisterSVIDServer(g, &svidAPI{s: s})
	trustdomainv1.RegisterTrustDomainServer(g, &trustDomainAPI{s: s})
	localauthorityv1.RegisterLocalAuthorityServer(g, &localAuthorityAPI{s: s})
	healthpb.RegisterHealthServer(g, s.health)
	return s.serve(ctx, g, &ownListener{UnixListener: l, log: s.cfg.Log})
}

func (s *Server) options() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.MaxRecvMsgSize(maxRequest),
		grpc.MaxSendMsgSize(maxMessage),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.MaxHeaderListSize(maxHeader),
		grpc.ConnectionTimeout(helloTimeout),
		grpc.ReadBufferSize(4096),
		grpc.WriteBufferSize(4096),
		grpc.StaticStreamWindowSize(streamWindow),
		grpc.StaticConnWindowSize(connWindow),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			Time: keepaliveAfter, Timeout: keepaliveTimeout, MaxConnectionIdle: idleTimeout,
		}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: keepaliveAfter / 4, PermitWithoutStream: true}),
	}
}

func (s *Server) serve(ctx context.Context, g *grpc.Server, l net.Listener) error {
	done := make(chan error, 1)
	go func() { done <- g.Serve(l) }()
	select {
	case err := <-done:
		return fmt.Errorf("serve %s: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	s.stopOnce.Do(func() {
		s.health.Shutdown()
		close(s.stopping)
	})
	graceful := make(chan struct{})
	go func() {
		g.GracefulStop()
		close(graceful)
	}()
	t := time.NewTimer(drainTimeout)
	defer t.Stop()
	select {
	case <-graceful:
	case <-t.C:
		g.Stop()
		<-graceful
	}
	<-done
	return nil
}

// SyncNow asks every subscribed proxy to fetch entries, bundle and SVIDs.
func (s *Server) SyncNow() {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.syncNow)
	s.syncNow = make(chan struct{})
	s.syncs++
}

func (s *Server) syncRequested() (again <-chan struct{}, n uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.syncNow, s.syncs
}
