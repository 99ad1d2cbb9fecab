package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"sallyport/internal/attest"
	"sallyport/internal/capture"
	"sallyport/internal/daemon"
	"sallyport/internal/isolate"
	"sallyport/internal/mesh"
	"sallyport/internal/socket"
	"sallyport/internal/upstream"
)

// startApp starts the application. The channel is closed when it has ended;
// without an application it never is.
func (s *sidecar) startApp(ground context.Context, g *errgroup.Group, app []string, stdout, stderr io.Writer) (<-chan struct{}, error) {
	defer close(s.started)
	if len(app) == 0 {
		return nil, nil
	}
	if s.room != nil {
		if err := s.room.Begin(); err != nil {
			return nil, daemon.Hint(daemon.Exit(daemon.Failed, err), "check the program after --")
		}
		return s.child.Load().Done(), nil
	}
	c, err := s.startChild(ground, g, app, stdout, stderr, nil)
	if err != nil {
		return nil, daemon.Hint(daemon.Exit(daemon.Failed, err), "check the program after --")
	}
	return c.Done(), nil
}

func (s *sidecar) startChild(ground context.Context, g *errgroup.Group, app []string, stdout, stderr io.Writer, through func(*exec.Cmd)) (*attest.Child, error) {
	c, err := attest.StartChild(attest.Spec{
		Path: app[0], Args: app[1:], Env: s.environ(os.Environ()), Stdin: os.Stdin, Stdout: stdout, Stderr: stderr,
		SameGroup: daemon.IsTerminal(os.Stdin), // so that it may read from the terminal
		Through:   through,
	})
	if err != nil {
		return nil, err
	}
	s.child.Store(c)
	// SIGINT and SIGTERM stop the sidecar, which then ends the child in its
	// turn; the others are the child's alone.
	g.Go(func() error { return c.Run(ground, false) })
	return c, nil
}

// isolateApp makes the namespace in which the application will begin, with the
// doors of the way out in it.
func (s *sidecar) isolateApp(ground context.Context, g *errgroup.Group, app []string, stdout, stderr io.Writer) error {
	plan := isolate.Plan{Listen: s.cfg.outbound(), Names: s.cfg.nameAddresses(true)}
	plan.Listen = append(plan.Listen, plan.Names...)
	if s.cfg.Inbound.Listen != "" {
		plan.App = s.cfg.Inbound.App
	}
	room, err := isolate.New(plan)
	if err != nil {
		return err
	}
	if _, err = s.startChild(ground, g, app, stdout, stderr, room.Into); err != nil {
		err = isolate.Refused(err)
	} else {
		err = room.Await()
	}
	if err != nil {
		room.Close()
		if errors.Is(err, isolate.ErrForbidden) {
			return daemon.Hint(daemon.Exit(daemon.Failed, err), "let users have namespaces (user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns), or leave --isolate out")
		}
		return daemon.Hint(daemon.Exit(daemon.Failed, err), "check the program after --")
	}
	s.room, s.callers.owners.In = room, room.Diag()
	s.log.Info("the application has a network namespace of its own")
	return nil
}

// app lends connections to the application.
func (s *sidecar) app() *upstream.Pool {
	open := upstream.NewLocal
	if s.cfg.Inbound.AppProtocol == appH2C {
		open = upstream.NewLocalHTTP2
	}
	p := open(s.cfg.Inbound.App, s.cfg.Limits.http())
	if s.room != nil {
		p.Through(s.room.Dial)
	}
	return p
}

// dialApp connects to the application, wherever it is.
func (s *sidecar) dialApp(ctx context.Context) (net.Conn, error) {
	if s.room != nil {
		return s.room.Dial(ctx)
	}
	d := net.Dialer{Control: socket.Tune}
	return d.DialContext(ctx, "tcp", s.cfg.Inbound.App.String())
}

// environ is the application's environment: ours, without what is meant for
// the sidecar, and with the way out and the Workload API in it.
func (s *sidecar) environ(ours []string) []string {
	env := slices.DeleteFunc(slices.Clone(ours), func(kv string) bool {
		name, _, _ := strings.Cut(kv, "=")
		switch strings.ToUpper(name) {
		case "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SPIFFE_ENDPOINT_SOCKET", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID":
			return true
		}
		return strings.HasPrefix(name, "SALLYPORT_")
	})
	env = append(env, "SPIFFE_ENDPOINT_SOCKET=unix://"+s.cfg.Workload.Socket)
	if !s.cfg.Outbound.Listen.IsValid() {
		return env
	}
	proxy := "http://" + s.cfg.Outbound.Listen.String()
	for _, name := range []string{"http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"} {
		env = append(env, name+"="+proxy)
	}
	const direct = "localhost,127.0.0.1,::1"
	return append(env, "no_proxy="+direct, "NO_PROXY="+direct)
}

// endChild asks the application to end, insists after the drain timeout, and
// returns its status as an error unless it is zero.
func (s *sidecar) endChild(now context.Context) error {
	c := s.child.Load()
	if c == nil {
		return nil
	}
	select {
	case <-c.Done():
	default:
		_ = c.Signal(syscall.SIGTERM) // it may end in this moment
		t := time.NewTimer(s.cfg.Drain.Timeout)
		defer t.Stop()
		select {
		case <-c.Done():
		case <-t.C:
			s.log.Warn("application did not end in time, killing it", "timeout", s.cfg.Drain.Timeout)
			s.killChild()
		case <-now.Done():
			s.killChild()
		}
	}
	if status := c.Wait(); status != 0 {
		return &daemon.ExitError{Code: status, Err: fmt.Errorf("the application ended with status %d", status)}
	}
	return nil
}

func (s *sidecar) killChild() {
	if c := s.child.Load(); c != nil {
		_ = c.Signal(syscall.SIGKILL) // it may have ended
	}
}

// tree is the application's process tree, for attestation. The application may
// ask for its identity before we have heard that it runs.
func (s *sidecar) tree() attest.ChildTree {
	<-s.started
	if c := s.child.Load(); c != nil {
		return c
	}
	return nil
}

// entriesOf are the entries that a local process satisfies.
func (s *sidecar) entriesOf(ctx context.Context, p capture.Process) ([]mesh.Entry, error) {
	have, err := s.selectorsOf(ctx, p)
	if err != nil {
		return nil, err
	}
	return attest.Match(s.agent.Entries(), have), nil
}

// selectorsOf are the selectors that are true of a local process.
func (s *sidecar) selectorsOf(ctx context.Context, p capture.Process) ([]mesh.Selector, error) {
	have, err := attest.Gather(p, s.tree())
	if err != nil || s.kubelet == nil {
		return have, err
	}
	return s.kubelet.Selectors(ctx, have)
}

// callers remembers for a moment what is true of the processes that call, so
// that one with a thousand connections is not looked into a thousand times.
type callers struct {
	owners capture.Owners

	mu   sync.Mutex // guards seen
	seen map[int]caller
}

type caller struct {
	process capture.Process
	have    []mesh.Selector
	until   time.Time
}

const (
	// callerHolds is how long what was seen of a caller counts. It adds to the
	// time between two looks at a connection.
	callerHolds = 500 * time.Millisecond
	maxCallers  = 1024
)

// selectors returns what gather says of a process, or said a moment ago while
// it was in the same state.
func (c *callers) selectors(p capture.Process, gather func() ([]mesh.Selector, error)) ([]mesh.Selector, error) {
	now := time.Now()
	c.mu.Lock()
	last, ok := c.seen[p.PID]
	c.mu.Unlock()
	if ok && now.Before(last.until) && last.process.Same(p) {
		return last.have, nil
	}
	have, err := gather()
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.seen == nil || len(c.seen) >= maxCallers {
		c.seen = map[int]caller{}
	}
	c.seen[p.PID] = caller{p, have, now.Add(callerHolds)}
	return have, nil
}

// isWorkload gives the question whether the process at the other end of a local
// connection satisfies the entry of the identity that is served.
func (s *sidecar) isWorkload(c net.Conn) (ask func() error) {
	from, to, err := capture.Ends(c)
	return func() error {
		if err != nil {
			return err
		}
		if err := s.isWorkloadsEnd(from, to); err != nil {
			return err
		}
		return capture.Stands(c) // else that was somebody else's end
	}
}

func (s *sidecar) isWorkloadsEnd(from, to netip.AddrPort) error {
	var candidates []int
	if c := s.child.Load(); c != nil {
		candidates = append(candidates, c.PID())
	}
	p, err := s.callers.owners.Of(to, from, candidates...)
	if err != nil {
		return err
	}
	self, err := s.agent.Self()
	if err != nil {
		return err
	}
	have, err := s.callers.selectors(p, func() ([]mesh.Selector, error) { return s.selectorsOf(context.Background(), p) })
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(attest.Match(s.agent.Entries(), have), func(e mesh.Entry) bool { return e.SPIFFEID == self.ID }) {
		return fmt.Errorf("pid %d (%s, uid %d) is not the workload %s", p.PID, p.ExePath, p.UID, self.ID)
	}
	return nil
}
