// Package translate gives the calls of a service another face: REST and
// gRPC-Web for one that speaks gRPC, gRPC for one that speaks REST.
//
// It stands beside the service as an application would: the proxy asks Face
// which method a request means, judges that method, and hands the call to a
// connection in memory (Connect), which vanguard serves here with descriptors
// from a file or from the service itself. What a request means is asked of the
// same tables that translate it, and looked at again when it is translated, so
// that nothing else is done than what was judged. Run owns all goroutines.
package translate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"sallyport/internal/mesh"
	"sallyport/internal/mux"
)

// MaxMessage bounds a message, in bytes, packed and unpacked.
const MaxMessage = 4 << 20

// maxBodies is what all calls may hold of their requests, which are read whole
// before the service hears of them.
const maxBodies = 256 << 20

// MethodField is the field by which the proxy tells which method was judged.
// A caller cannot set it, since the proxy drops such fields.
const MethodField = "Sallyport-Method"

// ErrNotReady is returned while nobody knows what the service has to offer.
var ErrNotReady = errors.New("the methods of the service are not known")

// ErrFace is returned for a face that the service does not get.
var ErrFace = errors.New("this form of calling is not served")

// Config is what a Translator needs.
type Config struct {
	// Dial connects to the service. Required.
	Dial func(context.Context) (net.Conn, error)
	// HTTP2 says that the service speaks HTTP/2 with prior knowledge; one that
	// speaks gRPC always does.
	HTTP2 bool
	// Log is for operators. Required.
	Log *slog.Logger
}

// A Translator translates the calls of one service, if a policy says so. It is
// safe for concurrent use.
type Translator struct {
	cfg    Config
	server *http.Server
	queue  chan net.Conn
	done   chan struct{}

	now atomic.Pointer[Offer]
	// bodies bounds what all calls together hold of their requests.
	bodies *mux.Budget
	used   chan struct{} // Use has put another offer in force

	mu sync.Mutex // lets one at a time ask the service
}

// An Offer is what the policy in force says of the service.
type Offer struct {
	spec mesh.Translate
	// table is nil while nobody knows the methods; err says why.
	table atomic.Pointer[table]
	err   atomic.Pointer[error]
	// asked is when the service was asked last, in Unix nanoseconds.
	asked     atomic.Int64
	transport *http.Transport
}

// New returns a Translator that translates nothing before Use. Run serves it.
func New(cfg Config) (*Translator, error) {
	if cfg.Dial == nil || cfg.Log == nil {
		return nil, errors.New("translate: dial or log is missing")
	}
	t := &Translator{cfg: cfg, queue: make(chan net.Conn), done: make(chan struct{}), used: make(chan struct{}, 1), bodies: mux.NewBudget(maxBodies)}
	t.server = &http.Server{
		Handler: t, MaxHeaderBytes: 64 << 10, ErrorLog: slog.NewLogLogger(cfg.Log.Handler(), slog.LevelError),
	}
	return t, nil
}

// Read makes an offer of a translation; nil is one of none. A set of descriptors
// that cannot be read or that contradicts itself is an error.
func (t *Translator) Read(spec *mesh.Translate) (*Offer, error) {
	if spec == nil {
		return nil, nil //nolint:nilnil // it offers nothing
	}
	if spec.To == toREST && spec.Reflection {
		return nil, errors.New("translate: a service that speaks REST has no reflection: name a file of descriptors")
	}
	if old := t.now.Load(); old != nil && same(old.spec, *spec) {
		return old, nil
	}
	o := &Offer{spec: *spec, transport: t.transport(spec.To)}
	if !spec.Reflection {
		tab, err := tableOf(spec.Set, o, t.cfg.Log)
		if err != nil {
			return nil, fmt.Errorf("translate: %s: %w", spec.Descriptors, err)
		}
		o.table.Store(tab)
	}
	return o, nil
}

// Use puts an offer in force.
func (t *Translator) Use(o *Offer) {
	if old := t.now.Swap(o); old != nil && old != o {
		old.transport.CloseIdleConnections()
	}
	select {
	case t.used <- struct{}{}:
	default:
	}
}

func same(a, b mesh.Translate) bool {
	return a.To == b.To && a.Reflection == b.Reflection && string(a.Set) == string(b.Set) &&
		strings.Join(a.Services, " ") == strings.Join(b.Services, " ")
}

// On says whether calls are translated.
func (t *Translator) On() bool { return t != nil && t.now.Load() != nil }

// A Face is how a call asks for a method.
type Face struct {
	// Method is the canonical method, /package.Service/Method; empty when the
	// service has none such.
	Method string
	// Translated says that the call goes through Connect; otherwise the service
	// takes it as it is.
	Translated bool
	// Web says that the caller reads refusals of gRPC-Web, REST those of
	// google.rpc.Status in JSON.
	Web, REST bool
}

// A Request is what Face looks at. Path is escaped.
type Request struct {
	Verb, Path, ContentType string
}

// Face finds the method that a request means. An error is ErrNotReady or
// ErrFace.
func (t *Translator) Face(ctx context.Context, r Request) (Face, error) {
	o := t.now.Load()
	if o == nil {
		return Face{}, ErrNotReady
	}
	tab, err := t.ready(ctx, o)
	if err != nil {
		return Face{REST: kindOf(r.ContentType) == plain}, err
	}
	f, err := o.face(tab, r)
	if f.Method == "" && err == nil && t.refresh(ctx, o, seldom) {
		f, err = o.face(o.table.Load(), r)
	}
	return f, err
}

func (o *Offer) face(tab *table, r Request) (Face, error) {
	toGRPC := o.spec.To == toGRPC
	kind := kindOf(r.ContentType)
	switch kind {
	case plain:
		f := Face{Method: tab.methodAt(r.Verb, r.Path), Translated: toGRPC, REST: true}
		if !toGRPC && !tab.certain(r, f.Method) {
			f.Method = ""
		}
		return f, nil
	case grpcProto, webProto:
	case grpcJSON, webJSON:
		if !toGRPC {
			return Face{Web: kind == webJSON}, fmt.Errorf("%w: a service that speaks REST is called with gRPC in protobuf", ErrFace)
		}
	default:
		return Face{Web: kind == webText}, fmt.Errorf("%w: of gRPC and gRPC-Web the formats proto and json are", ErrFace)
	}
	f := Face{Translated: !toGRPC || kind != grpcProto, Web: kind == webProto || kind == webJSON}
	if r.Verb == http.MethodPost && tab.methods[r.Path] != nil {
		f.Method = r.Path
	}
	return f, nil
}

// The values of mesh.Translate.To.
const (
	toGRPC = "grpc"
	toREST = "rest"
)

// A kind is what the type of a body says of the protocol.
type kind int

const (
	plain kind = iota
	grpcProto
	grpcJSON
	webProto
	webJSON
	webText
	grpcOther
)

// kindOf reads a media type. What begins as one of gRPC is never REST.
func kindOf(contentType string) kind {
	media, _, _ := strings.Cut(contentType, ";")
	media = strings.ToLower(strings.TrimSpace(media))
	switch media {
	case "application/grpc", "application/grpc+proto":
		return grpcProto
	case "application/grpc+json":
		return grpcJSON
	case "application/grpc-web", "application/grpc-web+proto":
		return webProto
	case "application/grpc-web+json":
		return webJSON
	}
	switch {
	case strings.HasPrefix(media, "application/grpc-web"):
		return webText
	case strings.HasPrefix(media, "application/grpc"):
		return grpcOther
	}
	return plain
}

// transport reaches the service. A call has its own bounds of time.
func (t *Translator) transport(to string) *http.Transport {
	p := new(http.Protocols)
	if to == toGRPC || t.cfg.HTTP2 {
		p.SetUnencryptedHTTP2(true)
	} else {
		p.SetHTTP1(true)
	}
	return &http.Transport{
		Protocols: p, DisableCompression: true, MaxIdleConnsPerHost: 256, IdleConnTimeout: 50 * time.Second, MaxResponseHeaderBytes: 64 << 10,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return t.cfg.Dial(ctx) },
	}
}

// Connect makes a connection to the service as others want to see it. What is
// sent on it must have been judged, and say so by MethodField.
func (t *Translator) Connect(ctx context.Context) (net.Conn, error) {
	near, far := net.Pipe()
	select {
	case t.queue <- far:
		return near, nil
	case <-t.done:
	case <-ctx.Done():
	}
	return nil, net.ErrClosed
}

// Run serves what Connect makes until ctx ends, and looks now and then whether
// a service that is asked for its methods has changed them.
func (t *Translator) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { t.follow(ctx) })
	stop := context.AfterFunc(ctx, func() { t.server.Close() })
	defer stop()
	err := t.server.Serve(&listener{t})
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// A listener accepts what Connect has made.
type listener struct{ t *Translator }

func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.t.queue:
		return c, nil
	case <-l.t.done:
		return nil, net.ErrClosed
	}
}

func (l *listener) Close() error {
	close(l.t.done) // the server closes it once
	return nil
}

func (l *listener) Addr() net.Addr { return &net.UnixAddr{Name: "translate", Net: "memory"} }
