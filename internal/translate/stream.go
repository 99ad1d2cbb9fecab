package translate

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"

	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/dynamicpb"
)

// prefix is what stands before a message of gRPC: whether it is packed, and its
// length.
const prefix = 5

// readMessage reads the next message into buf. io.EOF is the end of the stream.
func readMessage(r io.Reader, buf []byte) ([]byte, error) {
	var head [prefix]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	if head[0] != 0 {
		return nil, errors.New("the service has packed a message, which nobody asked for")
	}
	n := binary.BigEndian.Uint32(head[1:])
	if n > MaxMessage {
		return nil, fmt.Errorf("the service sent a message of %d bytes, the limit is %d", n, MaxMessage)
	}
	if uint32(cap(buf)) < n {
		// The length is the service's word: room is made as it comes.
		b := bytes.NewBuffer(buf[:0])
		if _, err := io.CopyN(b, r, int64(n)); err != nil {
			return nil, unexpected(err)
		}
		return b.Bytes(), nil
	}
	buf = buf[:n]
	_, err := io.ReadFull(r, buf)
	return buf, unexpected(err)
}

// A single is the body of a call with one message: what follows is an error. A
// message that came packed is read unpacked.
type single struct {
	*held
	packed bool // it may be
	begun  bool
	head   [prefix]byte
	first  bytes.Buffer // the head, and the message if that was unpacked
	left   int          // of the message
}

func (s *single) Read(p []byte) (int, error) {
	if !s.begun {
		s.begun = true
		if _, err := io.ReadFull(s.held, s.head[:]); err != nil {
			return 0, err
		}
		if err := s.open(); err != nil {
			return 0, err
		}
	}
	if s.first.Len() > 0 {
		return s.first.Read(p)
	}
	if s.left == 0 {
		n, err := s.held.Read(p[:min(len(p), 1)])
		if n > 0 {
			return 0, errors.New("the call has more than one message")
		}
		return 0, err
	}
	n, err := s.held.Read(p[:min(len(p), s.left)])
	s.left -= n
	return n, err
}

// open looks at the head of the message.
func (s *single) open() error {
	size := binary.BigEndian.Uint32(s.head[1:])
	if s.head[0] != 1 || !s.packed || size == 0 || size > MaxMessage {
		s.left = int(size)
		s.first.Write(s.head[:]) // vanguard says what is wrong with it
		return nil
	}
	s.first.Write(make([]byte, prefix))
	if _, err := io.Copy(&s.first, &unpacked{held: s.held, from: io.LimitReader(s.held, int64(size))}); err != nil {
		return unexpected(err)
	}
	b := s.first.Bytes()
	binary.BigEndian.PutUint32(b[1:], uint32(len(b)-prefix))
	return nil
}

func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// stream writes the messages of a stream to a caller of REST: as lines of JSON,
// or as events when it accepts those. How it ended stands in the trailers, and as
// the last line when it was an error.
func (x *call) stream(ctx context.Context, resp *http.Response) {
	x.take()
	s := &sender{call: x, events: strings.Contains(x.accept, "text/event-stream"), raw: x.desc.Output().FullName() == httpBody}
	var buf []byte
	for {
		var err error
		if buf, err = readMessage(resp.Body, buf); err == nil {
			err = s.send(resp, buf)
		}
		switch {
		case err == nil:
			continue
		case errors.Is(err, errGone):
			return
		case !errors.Is(err, io.EOF):
			s.end(broken(ctx, err))
		case resp.StatusCode != http.StatusOK:
			s.end(failure{code: codes.Unavailable, text: fmt.Sprintf("the service answered with %d", resp.StatusCode)})
		default:
			correct(resp.Trailer)
			s.end(x.ending(resp))
		}
		return
	}
}

// broken is how a stream has ended that has no end.
func broken(ctx context.Context, err error) failure {
	code, text := unreached(ctx, err)
	if code == codes.Unavailable && !errors.Is(err, io.ErrUnexpectedEOF) {
		code, text = codes.Internal, err.Error()
	}
	return failure{code: code, text: text}
}

// ending is what the service says of the end.
func (x *call) ending(resp *http.Response) failure {
	h := resp.Trailer
	if h.Get("Grpc-Status") == "" {
		h = resp.Header // all in one
	}
	n, err := strconv.ParseUint(h.Get("Grpc-Status"), 10, 8)
	if err != nil {
		return failure{code: codes.Internal, text: "the service did not say how the call ended"}
	}
	f := failure{code: known(codes.Code(n)), text: unescapeMessage(h.Get("Grpc-Message"))}
	bin := strings.TrimRight(h.Get("Grpc-Status-Details-Bin"), "=")
	b, err := base64.RawStdEncoding.DecodeString(bin)
	st := new(status.Status)
	if bin == "" || err != nil || proto.Unmarshal(b, st) != nil {
		return f
	}
	for _, d := range st.Details {
		if j, err := (protojson.MarshalOptions{Resolver: x.table.types}).Marshal(d); err == nil {
			f.details = append(f.details, j)
		}
	}
	return f
}

// errGone says that the caller takes no more.
var errGone = errors.New("the caller has gone")

// A sender writes what comes of a stream.
type sender struct {
	*call
	events, raw, begun bool
	out                []byte
}

func (s *sender) begin(resp *http.Response, contentType string) {
	s.begun = true
	h := s.w.Header()
	if resp != nil {
		pass(h, resp.Header)
	}
	for _, name := range []string{"Grpc-Encoding", "Grpc-Accept-Encoding", "Content-Encoding", "Trailer"} {
		h.Del(name)
	}
	switch {
	case contentType != "":
		h.Set("Content-Type", contentType)
	case s.events:
		h.Set("Content-Type", "text/event-stream")
		h.Set("Cache-Control", "no-cache")
	default:
		h.Set("Content-Type", "application/x-ndjson")
	}
	h.Set("Trailer", "Grpc-Status, Grpc-Message")
	s.w.WriteHeader(http.StatusOK)
}

// send writes one message.
func (s *sender) send(resp *http.Response, b []byte) error {
	m := dynamicpb.NewMessage(s.desc.Output())
	if err := (proto.UnmarshalOptions{Resolver: s.table.types}).Unmarshal(b, m); err != nil {
		return fmt.Errorf("the service sent what its descriptors do not describe: %w", err)
	}
	if s.raw {
		fields := s.desc.Output().Fields()
		if !s.begun {
			s.begin(resp, m.Get(fields.ByName("content_type")).String())
		}
		return s.write(m.Get(fields.ByName("data")).Bytes())
	}
	j, err := protojson.MarshalOptions{Resolver: s.table.types, EmitUnpopulated: true}.Marshal(m)
	if err != nil {
		return fmt.Errorf("the service sent what JSON cannot tell: %w", err)
	}
	if !s.begun {
		s.begin(resp, "")
	}
	return s.line("", j)
}

// line writes JSON, which has no line end in it.
func (s *sender) line(event string, j []byte) error {
	s.out = s.out[:0]
	if s.events {
		if event != "" {
			s.out = append(append(append(s.out, "event: "...), event...), '\n')
		}
		s.out = append(s.out, "data: "...)
	}
	s.out = append(append(s.out, j...), '\n')
	if s.events {
		s.out = append(s.out, '\n')
	}
	return s.write(s.out)
}

func (s *sender) write(b []byte) error {
	if _, err := s.w.Write(b); err != nil {
		return errGone
	}
	if http.NewResponseController(s.w).Flush() != nil {
		return errGone
	}
	return nil
}

// end writes how the stream ended.
func (s *sender) end(f failure) {
	if !s.begun && f.code != codes.OK {
		s.fail(f.code, f.text, f.details)
		return
	}
	if !s.begun {
		s.begin(nil, "")
	}
	if f.code != codes.OK && !s.raw {
		wrapped, err := json.Marshal(map[string]json.RawMessage{"error": statusText(f.code, f.text, f.details)})
		if err == nil {
			_ = s.line("error", wrapped) // the trailers say it again
		}
	}
	h := s.w.Header()
	h.Set("Grpc-Status", strconv.Itoa(int(f.code)))
	h.Set("Grpc-Message", escapeMessage(f.text))
}
