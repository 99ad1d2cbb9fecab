package translate

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strconv"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/reflect/protoreflect"

	"sallyport/internal/mux"
)

// A call is one that is translated. Vanguard writes to it as to the caller.
type call struct {
	w      http.ResponseWriter
	table  *table
	desc   protoreflect.MethodDescriptor
	method string
	kind   kind
	accept string
	// reached says that the service was asked: before that, what vanguard says
	// is about the request, and is put into words here.
	reached bool
	early   int // status that was held back
	wrote   bool
	said    bytes.Buffer
	// taken says that the answer is written past vanguard.
	taken bool
	aside http.Header
}

type callKey struct{}

// ServeHTTP implements http.Handler for calls that were judged.
func (t *Translator) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	x := &call{w: w, method: r.Header.Get(MethodField), kind: kindOf(r.Header.Get("Content-Type")), accept: r.Header.Get("Accept")}
	r.Header.Del(MethodField)
	o := t.now.Load()
	if o == nil || o.table.Load() == nil {
		x.fail(codes.Unavailable, ErrNotReady.Error(), nil)
		return
	}
	x.table = o.table.Load()
	if x.desc = x.table.methods[x.method]; x.desc == nil {
		x.fail(codes.Unimplemented, "the service has no such method", nil)
		return
	}
	within, bounded, err := timeoutOf(r.Header, x.kind == plain)
	if err != nil {
		x.fail(codes.InvalidArgument, err.Error(), nil)
		return
	}
	ctx := context.WithValue(r.Context(), callKey{}, x)
	if bounded {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, within)
		defer cancel()
	}
	r = r.WithContext(ctx)
	// Vanguard unescapes what it takes from the path.
	r.URL.Path, r.URL.RawPath = r.URL.EscapedPath(), ""
	held := &held{ReadCloser: r.Body, of: t.bodies}
	defer held.release()
	r.Body = held
	if x.kind == plain && r.Header.Get("Content-Encoding") == packing {
		r.Header.Del("Content-Encoding")
		r.Header.Del("Content-Length")
		r.ContentLength = -1
		r.Body = &unpacked{held: held, from: held}
	}
	_ = http.NewResponseController(w).EnableFullDuplex() // the connection is our own
	x.serve(o, r, held)
	held.release() // what comes now is thrown away
	held.drain(w)
}

// A held body counts what is read of it, and what that unpacks to, until the call
// is over.
type held struct {
	io.ReadCloser
	of *mux.Budget
	n  int
}

var errHeld = connect.NewError(connect.CodeResourceExhausted, errors.New("too much of other calls is held"))

func (h *held) Read(p []byte) (int, error) {
	n, err := h.ReadCloser.Read(p)
	if !h.take(n) {
		return 0, errHeld
	}
	return n, err
}

func (h *held) take(n int) bool {
	if !h.of.Take(n) {
		return false
	}
	h.n += n
	return true
}

// drain reads what nobody wanted: net/http, which does so after a handler that
// answers while it reads, then reads twice at once and gives up the connection.
func (h *held) drain(w http.ResponseWriter) {
	if n, _ := io.CopyN(io.Discard, h.ReadCloser, 2*MaxMessage); n == 2*MaxMessage {
		_ = http.NewResponseController(w).Flush() // the caller may still hear of it
		panic(http.ErrAbortHandler)
	}
}

func (h *held) release() {
	h.of.Give(h.n)
	h.n = 0
}

func (x *call) serve(o *Offer, r *http.Request, held *held) {
	switch {
	case x.kind == plain && o.spec.To != toGRPC, x.kind != plain && r.URL.Path != x.method:
		x.fail(codes.Internal, "the call is not the one that was judged", nil)
	case x.kind == plain && x.desc.IsStreamingClient():
		x.fail(codes.Unimplemented, "the method takes a stream of requests, which REST has no form for: call it with gRPC", nil)
	case x.kind != plain && x.desc.IsStreamingClient():
		x.fail(codes.Unimplemented, "the method takes a stream of requests, which is not translated: call it with gRPC in protobuf", nil)
	case x.kind != plain && o.spec.To == toREST && x.desc.IsStreamingServer():
		x.fail(codes.Unimplemented, "the method streams, and the service speaks REST", nil)
	case x.kind == plain:
		// A client says by such fields that it means another protocol.
		r.Header.Del("Connect-Protocol-Version")
		x.table.rest.ServeHTTP(x, r)
		x.finish()
	default:
		r.Body = &single{held: held, packed: r.Header.Get("Grpc-Encoding") == packing}
		r.Proto, r.ProtoMajor, r.ProtoMinor = "HTTP/2.0", 2, 0 // the connection in memory has what gRPC wants
		x.table.calls.ServeHTTP(x, r)
		x.finish()
	}
}

// Header implements http.ResponseWriter.
func (x *call) Header() http.Header {
	if x.taken {
		return x.aside
	}
	return x.w.Header()
}

// WriteHeader implements http.ResponseWriter.
func (x *call) WriteHeader(status int) {
	switch {
	case x.taken || x.early != 0:
	case !x.reached && status >= 400:
		x.early = status
	default:
		x.settle()
		x.wrote = true
		x.w.WriteHeader(status)
	}
}

// settle has an answer that is over with its head say so: a client that finds a
// status there waits for no trailers.
func (x *call) settle() {
	h := x.w.Header()
	if x.kind != plain && h.Get("Grpc-Status") != "" {
		h.Del("Trailer")
		h.Set("Content-Length", "0")
	}
}

// maxSaid bounds what is kept of words about a request.
const maxSaid = 16 << 10

// Write implements http.ResponseWriter.
func (x *call) Write(b []byte) (int, error) {
	switch {
	case x.taken:
		return len(b), nil
	case x.early != 0:
		x.said.Write(b[:min(len(b), max(maxSaid-x.said.Len(), 0))])
		return len(b), nil
	}
	return x.w.Write(b)
}

// Flush implements http.Flusher.
func (x *call) Flush() {
	if !x.taken && x.early == 0 {
		_ = http.NewResponseController(x.w).Flush() // a write tells that the caller is gone
	}
}

// take has the answer written by us from now on.
func (x *call) take() { x.reached, x.taken, x.aside = true, true, http.Header{} }

// reject answers a request that vanguard has not found fault with.
func (x *call) reject(code codes.Code, text string) {
	if x.early == 0 && !x.wrote && !x.taken {
		x.fail(code, text, nil)
		x.take()
	}
}

// unread rejects a request that could not be read.
func (x *call) unread(err error) {
	if errors.Is(err, errHeld) {
		x.reject(codes.Unavailable, errHeld.Message())
		return
	}
	x.reject(codes.InvalidArgument, "the request has no message that can be read")
}

// finish says what is wrong with a request that was not translated.
func (x *call) finish() {
	if x.early == 0 || x.taken {
		return
	}
	code, text := codes.InvalidArgument, ""
	var s struct {
		Code    codes.Code `json:"code"`
		Message string     `json:"message"`
	}
	if json.Unmarshal(x.said.Bytes(), &s) == nil {
		text = s.Message
		if s.Code != codes.Unknown && s.Code != codes.Internal && s.Code != codes.OK {
			code = s.Code
		}
	} else {
		text = string(bytes.TrimSpace(x.said.Bytes()))
		if c := codeOf(x.early); c != codes.Unknown && c != codes.Internal {
			code = c
		}
	}
	if text == "" {
		text = http.StatusText(x.early)
	}
	for _, name := range []string{"Content-Type", "Content-Encoding", "Content-Length", "Trailer", "X-Content-Type-Options"} {
		x.w.Header().Del(name)
	}
	x.fail(code, text, nil)
}

// fail answers in the protocol of the caller. Nothing has been written.
func (x *call) fail(code codes.Code, text string, details []json.RawMessage) {
	h := x.w.Header()
	switch x.kind {
	case plain:
		body := statusText(code, text, details)
		h.Set("Content-Type", "application/json")
		h.Set("Content-Length", strconv.Itoa(len(body)))
		status := httpStatus(code)
		if code == codes.ResourceExhausted && !x.reached {
			status = http.StatusRequestEntityTooLarge
		}
		x.w.WriteHeader(status)
		_, _ = x.w.Write(body) // a caller that has gone needs no answer
		return
	case webProto, webJSON, webText:
		h.Set("Content-Type", "application/grpc-web+proto")
	default:
		h.Set("Content-Type", "application/grpc")
	}
	h.Set("Content-Length", "0")
	h.Set("Grpc-Status", strconv.Itoa(int(code)))
	h.Set("Grpc-Message", escapeMessage(text))
	x.w.WriteHeader(http.StatusOK)
}

// maxTimeout is what a longer time counts as.
const maxTimeout = 24 * time.Hour
