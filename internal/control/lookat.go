package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"sallyport/internal/control/meshpb"
	"sallyport/internal/mesh"
)

// maxAnswered is how many looks a proxy answers at once. More are not heard: whoever
// asked learns that nobody answers.
const maxAnswered = 8

// shownBytes bounds the calls of one message.
const shownBytes = 1 << 20

// A Look is that of an operator at the calls of this proxy, through the issuer.
type Look struct {
	// By is who looks, as the issuer says.
	By     string
	Filter mesh.TapFilter
	// Show sends calls; none say that it has begun. An error ends the look.
	Show func([]*mesh.Tapped) error
}

func lookFromWire(m *meshpb.Look) (l Look, within time.Duration, err error) {
	if l.By = plain(m.GetBy()); l.By == "" {
		return l, 0, errors.New("nobody says who looks")
	}
	if l.Filter, err = mesh.ParseTapFilter(m.GetFilter()); err != nil {
		return l, 0, fmt.Errorf("filter: %w", err)
	}
	within, err = lookTime(m.GetSeconds())
	return l, within, err
}

// shows answers looks over the link of one stream, until ctx ends.
type shows struct {
	ctx  context.Context
	c    *Client
	l    *link
	show func(context.Context, Look) error
	*looking
}

// looking are the looks that go on, over whatever stream they came.
type looking struct {
	at      chan struct{} // one for each
	running sync.WaitGroup
}

// answer answers a look in a goroutine of its own.
func (s *shows) answer(m *meshpb.Look) {
	select {
	case s.at <- struct{}{}:
	default:
		s.c.cfg.Log.Warn("too many look at calls through the issuer: one is not answered", slog.String("by", plain(m.GetBy())))
		return
	}
	s.running.Go(func() {
		defer func() { <-s.at }()
		if err := s.once(m); err != nil && s.ctx.Err() == nil {
			s.c.cfg.Log.Warn("calls not shown", slog.String("by", plain(m.GetBy())), slog.Any("err", err))
		}
	})
}

func (s *shows) once(m *meshpb.Look) error {
	look, within, bad := lookFromWire(m)
	ctx, cancel := context.WithTimeout(s.ctx, within)
	if bad != nil {
		cancel()
		ctx, cancel = context.WithTimeout(s.ctx, lookWait)
	}
	defer cancel()
	st, err := meshpb.NewMeshClient(s.l.cc).ShowCalls(ctx)
	if err != nil {
		return err
	}
	_ = st.Send(&meshpb.ShownCalls{Look: m.GetId()}) // the reason of a failure is in the status
	if err := accepted(st, cancel); err != nil {
		return err
	}
	s.running.Go(func() {
		defer cancel()
		_ = st.RecvMsg(new(meshpb.ShownAck)) // nothing but the end
	})
	begun := false
	look.Show = func(list []*mesh.Tapped) error {
		begun = true
		for _, part := range shownToWire(list) {
			if err := st.Send(part); err != nil {
				return err
			}
		}
		return nil
	}
	if err = bad; err == nil {
		err = s.show(ctx, look)
	}
	if err != nil && !begun {
		_ = st.Send(&meshpb.ShownCalls{Refused: reasonText(err)})
		_ = st.CloseSend()
		<-ctx.Done() // the issuer ends it once it has read that
		return err
	}
	if errors.Is(err, io.EOF) {
		return nil // nobody looks any more
	}
	return err
}

// shownToWire makes as many messages of calls as they need, one at least.
func shownToWire(list []*mesh.Tapped) (out []*meshpb.ShownCalls) {
	m, size := &meshpb.ShownCalls{}, 0
	for _, t := range list {
		b, err := json.Marshal(t)
		if err == nil && len(b) > maxTapped {
			bare := *t
			bare.Headers = nil
			b, err = json.Marshal(&bare)
		}
		if err != nil || len(b) > maxTapped {
			continue // a path that no application reads
		}
		if len(m.Calls) == maxShown || size+len(b) > shownBytes {
			out = append(out, m)
			m, size = &meshpb.ShownCalls{}, 0
		}
		m.Calls, size = append(m.Calls, b), size+len(b)
	}
	return append(out, m)
}

// A Tap is what an operator asks an issuer to show.
type Tap struct {
	// Workload is whose proxy it is; Agent says which, when there are several.
	Workload, Agent spiffeid.ID
	Filter          mesh.TapFilter
	// Within is how long at most, in whole seconds. Zero stands for the longest time.
	Within time.Duration
}

// ErrEnough ends a Tap without an error.
var ErrEnough = errors.New("enough calls were seen")

// Tap shows the calls of a proxy until the time is over, ctx ends, or show returns an
// error.
func (a *Admin) Tap(ctx context.Context, t Tap, show func(*mesh.Tapped) error) error {
	const verb = "tap"
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	req := &meshpb.TapRequest{Workload: t.Workload.String(), Filter: t.Filter.Query(), Seconds: int64((t.Within + time.Second - 1) / time.Second)}
	if !t.Agent.IsZero() {
		req.Agent = t.Agent.String()
	}
	st, err := meshpb.NewAdminClient(a.cc).Tap(ctx, req)
	for err == nil {
		var m *meshpb.TapResponse
		if m, err = st.Recv(); err != nil {
			break
		}
		for _, b := range m.GetCalls() {
			call, err := tappedFromWire(b)
			if err != nil {
				return fmt.Errorf("%s: %w", verb, err)
			}
			if err := show(&call); errors.Is(err, ErrEnough) {
				return nil
			} else if err != nil {
				return err
			}
		}
	}
	switch code := status.Code(err); {
	case errors.Is(err, io.EOF), ctx.Err() != nil:
		return nil
	case code == codes.Unimplemented:
		return fmt.Errorf("%s: %w: this issuer is of an older version, which passes no calls on; tap on the machine of the proxy, or upgrade the issuer", verb, ErrRefused)
	}
	return a.explain(verb, err)
}
