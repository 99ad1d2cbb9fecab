package sink

import (
	"bytes"
	"context"
	"encoding/pem"
	"errors"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	export "go.opentelemetry.io/proto/slim/otlp/collector/logs/v1"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"sallyport/internal/meshtest"
)

// A logsService is a collector's side of OTLP over gRPC.
type logsService struct {
	t    *testing.T
	addr string
	opts []grpc.ServerOption
	// answer says what becomes of a request. Default: all is taken.
	answer func(seqs []uint64) (*export.ExportLogsServiceResponse, error)

	srv *grpc.Server
	mu  sync.Mutex // guards what follows
	got []uint64
	md  metadata.MD // of the last request
}

func (l *logsService) start() {
	l.t.Helper()
	ln := meshtest.Listen(l.t, l.addr)
	l.addr = ln.Addr().String()
	l.srv = grpc.NewServer(l.opts...)
	l.srv.RegisterService(&grpc.ServiceDesc{
		ServiceName: "opentelemetry.proto.collector.logs.v1.LogsService", HandlerType: (*any)(nil),
		Methods: []grpc.MethodDesc{{MethodName: "Export", Handler: func(_ any, ctx context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
			return l.export(ctx, decode)
		}}},
	}, l)
	go l.srv.Serve(ln) //nolint:errcheck // ends with stop
}

func (l *logsService) export(ctx context.Context, decode func(any) error) (any, error) {
	var q export.ExportLogsServiceRequest
	if err := decode(&q); err != nil {
		return nil, err
	}
	var seqs []uint64
	for _, r := range q.ResourceLogs[0].ScopeLogs[0].LogRecords {
		seqs = append(seqs, seqsOf(l.t, r.Body.GetStringValue()+"\n")...)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.md, _ = metadata.FromIncomingContext(ctx)
	resp, err := &export.ExportLogsServiceResponse{}, error(nil)
	if l.answer != nil {
		resp, err = l.answer(seqs)
	}
	if err == nil {
		l.got = append(l.got, seqs...)
	}
	return resp, err
}

func TestOTLPOverGRPC(t *testing.T) {
	web := httptest.NewTLSServer(nil) // for its certificate
	web.Close()
	ca, token := filepath.Join(t.TempDir(), "ca.pem"), filepath.Join(t.TempDir(), "token")
	if err := errors.Join(
		os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: web.Certificate().Raw}), 0o600),
		os.WriteFile(token, []byte("secret\n"), 0o600),
	); err != nil {
		t.Fatal(err)
	}
	l := &logsService{t: t, opts: []grpc.ServerOption{grpc.Creds(credentials.NewServerTLSFromCert(&web.TLS.Certificates[0]))}}
	l.start()
	log, path := openLog(t)
	s := open(t, Config{Name: "o", Batch: BatchConfig{Records: 10, Wait: 10 * time.Millisecond}, OTLP: &OTLPConfig{
		Protocol: "grpc", URL: "https://" + l.addr, Token: Secret{File: token}, TLS: TLS{CA: ca},
	}}, log, path)
	end := start(t, s)
	write(t, log, 50)
	awaitSent(t, s, 50)
	l.srv.Stop()
	write(t, log, 50) // while it is down
	if err := os.WriteFile(token, []byte("another\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	l.start()
	awaitSent(t, s, 100)
	end()
	l.srv.Stop() // does not wait for what it serves
	l.mu.Lock()
	defer l.mu.Unlock()
	if !slices.Equal(slices.Compact(slices.Clone(l.got)), upTo(100)) {
		t.Errorf("came %v", l.got)
	}
	if got := l.md.Get("authorization"); !slices.Equal(got, []string{"Bearer another"}) {
		t.Errorf("the credential was %q", got)
	}
}

func TestOTLPOverGRPCRefusals(t *testing.T) {
	for _, tt := range []struct {
		name    string
		opts    []grpc.ServerOption
		answer  func(seqs []uint64) (*export.ExportLogsServiceResponse, error)
		missing []uint64 // of 40
		why     string   // stands beside those set aside
	}{
		{"a record that the server cannot read", nil, func(seqs []uint64) (*export.ExportLogsServiceResponse, error) {
			if slices.Contains(seqs, 17) {
				return nil, status.Error(codes.InvalidArgument, "no such thing")
			}
			return &export.ExportLogsServiceResponse{}, nil
		}, []uint64{17}, "InvalidArgument: \\\"no such thing\\\""},
		{"a partial success", nil, func(seqs []uint64) (*export.ExportLogsServiceResponse, error) {
			if seqs[0] == 1 {
				return &export.ExportLogsServiceResponse{PartialSuccess: &export.ExportLogsPartialSuccess{RejectedLogRecords: 1, ErrorMessage: "too old"}}, nil
			}
			return &export.ExportLogsServiceResponse{}, nil
		}, nil, "rejected 1 of"},
		{"batches too large for it", []grpc.ServerOption{grpc.MaxRecvMsgSize(4 << 10)}, nil, nil, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := &logsService{t: t, opts: tt.opts, answer: tt.answer}
			l.start()
			defer l.srv.Stop()
			log, path := openLog(t)
			s := open(t, Config{Name: "o", OTLP: &OTLPConfig{Protocol: "grpc", URL: "http://" + l.addr}, Batch: BatchConfig{Records: 40}}, log, path)
			write(t, log, 40)
			deliver(t, s, 40)
			l.mu.Lock()
			defer l.mu.Unlock()
			want := slices.DeleteFunc(upTo(40), func(n uint64) bool { return slices.Contains(tt.missing, n) })
			got := slices.DeleteFunc(slices.Clone(l.got), func(n uint64) bool { return n > 40 }) // a record may tell of the refusal
			if !slices.Equal(got, want) {
				t.Errorf("came %v", got)
			}
			b, err := os.ReadFile(path + ".sink-o.refused")
			if tt.why != "" && (err != nil || !bytes.Contains(b, []byte(tt.why))) || tt.why == "" && err == nil {
				t.Errorf("set aside: %v %s", err, b)
			}
		})
	}
}

func TestGRPCAnswers(t *testing.T) {
	later, err := status.New(codes.Unavailable, "later").WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(3 * time.Second)})
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name           string
		err            error
		refused, large bool
		after          time.Duration
	}{
		{"not a status", errors.New("x"), false, false, 0},
		{"wrong credential", status.Error(codes.Unauthenticated, "x"), false, false, 0},
		{"no such service", status.Error(codes.Unimplemented, "x"), false, false, 0},
		{"down", status.Error(codes.Unavailable, "x"), false, false, 0},
		{"says when", later.Err(), false, false, 3 * time.Second},
		{"over a quota", status.Error(codes.ResourceExhausted, "quota"), false, false, 0},
		{"too large", status.Error(codes.ResourceExhausted, "grpc: received message larger than max (9 vs. 4)"), true, true, 0},
		{"unreadable", status.Error(codes.InvalidArgument, "x"), true, false, 0},
	} {
		got := grpcAnswer(tt.err)
		var no *refusal
		var b *busy
		if errors.As(got, &no) != tt.refused || no != nil && no.large != tt.large || errors.As(got, &b) != (tt.after > 0) || b != nil && b.after != tt.after {
			t.Errorf("%s: %#v", tt.name, got)
		}
	}
}
