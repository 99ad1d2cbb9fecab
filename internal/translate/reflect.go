package translate

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/jhump/protoreflect/v2/grpcreflect"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
)

const (
	// seldom is how often at most an unknown method has the service asked again:
	// whoever calls at random must not make it busy.
	seldom = 10 * time.Second
	// often is the same while nothing is known.
	often = 500 * time.Millisecond
	// followEvery is how often it is asked anyway.
	followEvery = 5 * time.Minute
	// askTimeout bounds one asking; a call waits as long.
	askTimeout = 3 * time.Second
	// maxSet bounds the descriptors that a service may have, in bytes.
	maxSet = 8 << 20
)

// ready is the table of an offer. While there is none the service is asked.
func (t *Translator) ready(ctx context.Context, o *Offer) (*table, error) {
	if tab := o.table.Load(); tab != nil {
		return tab, nil
	}
	t.refresh(ctx, o, often)
	if tab := o.table.Load(); tab != nil {
		return tab, nil
	}
	if err := o.err.Load(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotReady, *err)
	}
	return nil, ErrNotReady
}

// refresh asks the service for its methods, unless it was asked a moment ago,
// and says whether it has been. What was known stays when it does not answer.
func (t *Translator) refresh(ctx context.Context, o *Offer, atMost time.Duration) bool {
	due := func() bool { return time.Now().UnixNano()-o.asked.Load() >= int64(atMost) }
	if !o.spec.Reflection || !due() {
		return false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if !due() {
		return true // somebody else has just asked
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	tab, err := t.learn(ctx, o)
	o.asked.Store(time.Now().UnixNano())
	switch {
	case err == nil && tab != o.table.Load():
		o.table.Store(tab)
		t.cfg.Log.Info("the service has told its methods", "methods", len(tab.methods))
	case err != nil && !errors.Is(ctx.Err(), context.Canceled):
		o.err.Store(&err)
		t.cfg.Log.Warn("the service does not tell its methods", "err", err, "known", o.table.Load() != nil)
	}
	return true
}

// learn makes a table of what the service says, the one that there is when it
// says the same. What it says may be anything.
func (t *Translator) learn(ctx context.Context, o *Offer) (tab *table, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("reflection: the descriptors cannot be read: %v", p)
		}
	}()
	set, err := t.ask(ctx)
	if err != nil {
		return nil, err
	}
	if old := o.table.Load(); old != nil && string(old.set) == string(set) {
		return old, nil
	}
	return tableOf(set, o, t.cfg.Log)
}

// follow asks every now and then.
func (t *Translator) follow(ctx context.Context) {
	for {
		timer := time.NewTimer(followEvery)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-t.used:
		case <-timer.C:
		}
		timer.Stop()
		if o := t.now.Load(); o != nil {
			t.refresh(ctx, o, seldom)
		}
	}
}

// ask reads the descriptors of all services by reflection, as the bytes of a
// FileDescriptorSet.
func (t *Translator) ask(ctx context.Context) ([]byte, error) {
	first, err := t.cfg.Dial(ctx) // the client would try until the time is up
	if err != nil {
		return nil, err
	}
	conns := make(chan net.Conn, 1)
	conns <- first
	cc, err := grpc.NewClient("passthrough:///service", grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy(),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			select {
			case c := <-conns:
				return c, nil
			default:
				return t.cfg.Dial(ctx)
			}
		}))
	if err != nil {
		first.Close()
		return nil, err
	}
	defer func() {
		cc.Close()
		select {
		case c := <-conns: // it never came to be used
			c.Close()
		default:
		}
	}()
	c := grpcreflect.NewClientAuto(ctx, cc)
	defer c.Reset()
	names, err := c.ListServices()
	if err != nil {
		return nil, fmt.Errorf("reflection: %w", err)
	}
	slices.Sort(names)
	g := &gathered{seen: map[string]bool{}}
	for _, n := range names {
		if strings.HasPrefix(string(n), "grpc.reflection.") {
			continue // what it is for is done here
		}
		f, err := c.FileContainingSymbol(n)
		if err != nil {
			return nil, fmt.Errorf("reflection: %s: %w", n, err)
		}
		g.add(f)
	}
	if len(g.set.File) == 0 {
		return nil, errors.New("reflection: the service names no service")
	}
	if proto.Size(&g.set) > maxSet {
		return nil, fmt.Errorf("reflection: the descriptors have more than %d bytes", maxSet)
	}
	return proto.MarshalOptions{Deterministic: true}.Marshal(&g.set)
}

// gathered are files with all that they import, which stands before them.
type gathered struct {
	set  descriptorpb.FileDescriptorSet
	seen map[string]bool
}

func (g *gathered) add(f protoreflect.FileDescriptor) {
	if g.seen[f.Path()] {
		return
	}
	g.seen[f.Path()] = true
	for i := range f.Imports().Len() {
		g.add(f.Imports().Get(i).FileDescriptor)
	}
	g.set.File = append(g.set.File, protodesc.ToFileDescriptorProto(f))
}
