package control

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"hash/maphash"
	"log/slog"
	"math"
	"net"
	"os"
	"runtime/debug"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"sallyport/internal/capture"
	"sallyport/internal/control/meshpb"
	"sallyport/internal/mesh"
)

// A caller is the agent that the TLS certificate of a call proves.
type caller struct {
	id   spiffeid.ID
	leaf *x509.Certificate
	// serial is leaf's, decimal: its stream is judged at every change.
	serial string
}

type callerKey struct{}

// callerOf returns the agent that guardUnary or guardStream has let in.
func callerOf(ctx context.Context) (caller, error) {
	c, ok := ctx.Value(callerKey{}).(caller)
	if !ok {
		return caller{}, refuseAgent(types.PermissionDeniedDetails_AGENT_NOT_ATTESTED, "no agent SVID")
	}
	return c, nil
}

// authenticate reads who calls from the TLS connection, and from nothing else.
// The certificate was verified when the connection was made.
func (s *Server) authenticate(ctx context.Context) (caller, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return caller{}, refuse(codes.PermissionDenied, "caller has no address")
	}
	ti, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(ti.State.PeerCertificates) == 0 {
		return caller{}, refuse(codes.PermissionDenied, "caller presented no agent SVID")
	}
	leaf := ti.State.PeerCertificates[0]
	id, err := leafID(leaf)
	if err != nil {
		return caller{}, refuse(codes.PermissionDenied, "caller's certificate is no agent SVID")
	}
	if !id.MemberOf(s.cfg.TrustDomain) {
		return caller{}, refuse(codes.PermissionDenied, "%s is not a member of %s", id, s.cfg.TrustDomain)
	}
	return caller{id: id, leaf: leaf, serial: leaf.SerialNumber.String()}, nil
}

// authorize checks that an agent is known, not banned and uses its current SVID.
// The first use of a renewed SVID makes that the current one.
func (s *Server) authorize(ctx context.Context, c caller) error {
	return s.judge(ctx, c, s.cfg.Registry.GetAgent)
}

// A findAgent is Registry.GetAgent or Registry.HeldAgent.
type findAgent func(context.Context, spiffeid.ID) (mesh.Agent, error)

// judge is authorize by what find says of the agent.
func (s *Server) judge(ctx context.Context, c caller, find findAgent) error {
	if s.cfg.Now().After(c.leaf.NotAfter) {
		return refuseAgent(types.PermissionDeniedDetails_AGENT_EXPIRED, "agent SVID expired at %s", stamp(c.leaf.NotAfter))
	}
	a, err := find(ctx, c.id)
	if err != nil {
		return agentError(c.id, err)
	}
	if !a.Banned && a.Serial != c.serial && a.NextSerial == c.serial {
		if a, err = s.activate(ctx, c, c.serial); err != nil {
			return err
		}
	}
	switch {
	case a.Banned:
		return refuseAgent(types.PermissionDeniedDetails_AGENT_BANNED, "agent %s is banned", c.id)
	case a.Serial != c.serial:
		return refuseAgent(types.PermissionDeniedDetails_AGENT_NOT_ACTIVE, "agent %s uses an SVID that a newer one replaced", c.id)
	}
	return nil
}

// activate makes the renewed SVID the current one.
func (s *Server) activate(ctx context.Context, c caller, serial string) (mesh.Agent, error) {
	defer s.agents.lock(c.id)()
	for {
		a, err := s.cfg.Registry.GetAgent(ctx, c.id)
		if err != nil {
			return a, agentError(c.id, err)
		}
		if a.Banned || a.NextSerial != serial {
			return a, nil
		}
		a.Serial, a.NextSerial, a.ExpiresAt = serial, "", c.leaf.NotAfter
		err = s.cfg.Registry.PutAgent(ctx, a)
		if err == nil {
			return a, nil
		}
		if !errors.Is(err, mesh.ErrChanged) {
			return a, fmt.Errorf("activate SVID of agent %s: %w", c.id, err)
		}
		// Another issuer was faster; the next round says with what.
	}
}

func agentError(id spiffeid.ID, err error) error {
	switch {
	case errors.Is(err, mesh.ErrNotFound):
		return refuseAgent(types.PermissionDeniedDetails_AGENT_NOT_ATTESTED, "agent %s is not attested", id)
	case errors.Is(err, mesh.ErrChanged):
		return refuse(codes.Aborted, "agent %s was changed by another issuer meanwhile: try again", id)
	}
	return fmt.Errorf("look up agent %s: %w", id, err)
}

func (s *Server) guardUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	ctx, err := s.guard(ctx, info.FullMethod)
	if err != nil {
		return nil, err
	}
	if c, err := callerOf(ctx); err == nil {
		if err := s.spend(c.id, max(workOf[info.FullMethod], 1)); err != nil {
			return nil, err
		}
	}
	return next(ctx, req)
}

func (s *Server) guardStream(srv any, st grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	if rights[info.FullMethod]&toAnyone != 0 {
		return next(srv, st)
	}
	ctx, err := s.guard(st.Context(), info.FullMethod)
	if err != nil {
		return err
	}
	c, err := callerOf(ctx)
	if err != nil {
		return next(srv, &agentStream{ServerStream: st, ctx: ctx})
	}
	if err := s.spend(c.id, max(workOf[info.FullMethod], 1)); err != nil {
		return err
	}
	leave, err := s.enter(c.id, info.FullMethod)
	if err != nil {
		return err
	}
	defer leave()
	ctx, unwatch := s.evictions.watch(ctx, c.id)
	defer unwatch()
	err = next(srv, &agentStream{ServerStream: st, ctx: ctx})
	if why := context.Cause(ctx); why != nil && st.Context().Err() == nil {
		return why
	}
	return err
}

type agentStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s *agentStream) Context() context.Context { return s.ctx }

// RecvMsg gives nothing of an agent that was evicted meanwhile.
func (s *agentStream) RecvMsg(m any) error {
	if err := s.ServerStream.RecvMsg(m); err != nil {
		return err
	}
	return s.ctx.Err()
}

// enter counts one more stream of an agent. Looks are counted apart: operators begin
// them, and what the agent needs itself must not wait for their end.
func (s *Server) enter(id spiffeid.ID, method string) (leave func(), err error) {
	of, most, what := &s.streams, s.cfg.StreamsPerAgent, "streams open: close one first"
	if method == meshpb.Mesh_ShowCalls_FullMethodName {
		of, most, what = &s.shown, agentLooks, "looks to answer, which is the limit"
	}
	who := id.String()
	if !of.enter(who, most, math.MaxInt) {
		return nil, refuse(codes.ResourceExhausted, "agent %s has %d %s", id, most, what)
	}
	return func() { of.leave(who) }, nil
}

func (s *Server) recoverUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (resp any, err error) {
	defer func() { err = s.outcome(info.FullMethod, recover(), err) }()
	return next(ctx, req)
}

func (s *Server) recoverStream(srv any, st grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) (err error) {
	defer func() { err = s.outcome(info.FullMethod, recover(), err) }()
	return next(srv, st)
}

func (s *Server) countUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	s.cfg.OnMessage(info.FullMethod)
	began := time.Now()
	resp, err := next(ctx, req)
	s.cfg.OnCall(info.FullMethod, uint32(status.Code(err)), time.Since(began))
	return resp, err
}

func (s *Server) countStream(srv any, st grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	return next(srv, &countedStream{st, info.FullMethod, s.cfg.OnMessage})
}

type countedStream struct {
	grpc.ServerStream
	method string
	count  func(method string)
}

func (c *countedStream) RecvMsg(m any) error {
	err := c.ServerStream.RecvMsg(m)
	if err == nil {
		c.count(c.method)
	}
	return err
}

// outcome decides what of an error or panic crosses the wire. What does not is
// logged here, once.
func (s *Server) outcome(method string, panicked any, err error) error {
	switch {
	case panicked != nil:
		s.cfg.Log.Error("call panicked", slog.String("method", method), slog.Any("panic", panicked), slog.String("stack", string(debug.Stack())))
	case err == nil:
		return nil
	default:
		if known, ok := crosses(err); ok {
			return known
		}
		s.cfg.Log.Error("call failed", slog.String("method", method), slog.Any("err", err))
	}
	return refuse(codes.Internal, "internal")
}

// keyedLocks serialises work on one agent; agents share a lock now and then.
type keyedLocks struct {
	once sync.Once
	seed maphash.Seed
	mu   [64]sync.Mutex
}

// lock returns the unlock.
func (k *keyedLocks) lock(id spiffeid.ID) func() {
	k.once.Do(func() { k.seed = maphash.MakeSeed() })
	m := &k.mu[maphash.String(k.seed, id.String())%uint64(len(k.mu))]
	m.Lock()
	return m.Unlock
}

// An ownConn names the process at the other end as its address.
type ownConn struct {
	net.Conn
	cred capture.Cred
}

func (c *ownConn) RemoteAddr() net.Addr {
	return &net.UnixAddr{Net: "unix", Name: fmt.Sprintf("uid %d pid %d", c.cred.UID, c.cred.PID)}
}

// ownListener accepts connections of this process's own user and of root only.
type ownListener struct {
	*net.UnixListener
	log *slog.Logger
}

func (l *ownListener) Accept() (net.Conn, error) {
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			return nil, err
		}
		cred, err := capture.PeerCred(c)
		if err == nil && (cred.UID == 0 || int(cred.UID) == os.Geteuid()) {
			return &ownConn{Conn: c, cred: cred}, nil
		}
		l.log.Warn("admin connection refused", slog.Uint64("uid", uint64(cred.UID)), slog.Any("err", err))
		c.Close()
	}
}
