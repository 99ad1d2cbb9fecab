package sink

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"path"
	"regexp"
	"strings"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
)

// S3Config is a bucket of a system that speaks S3.
type S3Config struct {
	// Endpoint without the bucket, such as https://s3.eu-central-1.amazonaws.com.
	// https, or http on loopback. Required.
	Endpoint string `yaml:"endpoint"`
	// Region of the bucket. Default us-east-1.
	Region string `yaml:"region"`
	// Bucket must be there. Required.
	Bucket string `yaml:"bucket"`
	// Prefix of the names of objects, such as "sallyport/prod".
	Prefix string `yaml:"prefix"`
	// AccessKey and SecretKey are the credentials. Required.
	AccessKey Secret `yaml:"access_key"`
	SecretKey Secret `yaml:"secret_key"`
	TLS       `yaml:",inline"`
}

var (
	goodBucket = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$`)
	goodPrefix = regexp.MustCompile(`^[A-Za-z0-9_.=-]+(/[A-Za-z0-9_.=-]+)*$`)
)

func (c *S3Config) validate() error {
	errs := []error{validateURL("endpoint", c.Endpoint, "https://s3.eu-central-1.amazonaws.com")}
	if u, err := url.Parse(c.Endpoint); err == nil && (strings.Trim(u.Path, "/") != "" || u.RawQuery != "") {
		errs = append(errs, errors.New("endpoint: has a path; write the bucket in bucket, what follows it in prefix"))
	}
	if !goodBucket.MatchString(c.Bucket) {
		errs = append(errs, fmt.Errorf("bucket: %.80q is not the name of a bucket", c.Bucket))
	}
	if c.Prefix != "" && (!goodPrefix.MatchString(c.Prefix) || path.Clean(c.Prefix) != c.Prefix || strings.HasPrefix(c.Prefix, ".")) {
		errs = append(errs, fmt.Errorf("prefix: %.80q is not words of letters, digits and _.=- between single '/'", c.Prefix))
	}
	for name, s := range map[string]Secret{"access_key": c.AccessKey, "secret_key": c.SecretKey} {
		if s == (Secret{}) {
			errs = append(errs, fmt.Errorf("%s: missing; write file or env", name))
		}
		errs = append(errs, within(name, s.validate()))
	}
	return errors.Join(append(errs, c.TLS.validate())...)
}

func (c *S3Config) open(env Env, _ string) (peer, error) {
	rt, err := transport(c.TLS, env)
	if err != nil {
		return nil, err
	}
	keys := &keyFiles{cfg: *c}
	if _, err := keys.Retrieve(); err != nil {
		return nil, err
	}
	u, err := url.Parse(c.Endpoint)
	if err != nil {
		return nil, err
	}
	client, err := minio.New(u.Host, &minio.Options{
		Creds: credentials.New(keys), Secure: u.Scheme == "https", Region: cmp.Or(c.Region, "us-east-1"), Transport: rt,
		MaxRetries: 1, // the loop of every sink tries again
	})
	if err != nil {
		return nil, err
	}
	return &s3{cfg: *c, client: client, rt: rt}, nil
}

// keyFiles reads the credentials anew for each object.
type keyFiles struct{ cfg S3Config }

// Retrieve implements credentials.Provider.
func (k *keyFiles) Retrieve() (credentials.Value, error) {
	access, err := k.cfg.AccessKey.read()
	if err != nil {
		return credentials.Value{}, fmt.Errorf("access_key: %w", err)
	}
	secret, err := k.cfg.SecretKey.read()
	if err != nil {
		return credentials.Value{}, fmt.Errorf("secret_key: %w", err)
	}
	return credentials.Value{AccessKeyID: access, SecretAccessKey: secret, SignerType: credentials.SignatureV4}, nil
}

// RetrieveWithCredContext implements credentials.Provider.
func (k *keyFiles) RetrieveWithCredContext(*credentials.CredContext) (credentials.Value, error) {
	return k.Retrieve()
}

// IsExpired implements credentials.Provider.
func (k *keyFiles) IsExpired() bool { return true }

// s3 is the peer of kind s3: an object a batch, whose name follows from the log
// and the numbers. A batch that comes again has the same, so it replaces itself.
type s3 struct {
	cfg    S3Config
	client *minio.Client
	rt     *http.Transport
}

// object is the name of a batch. Twenty digits keep names in order.
func (s *s3) object(b *batch) string {
	return path.Join(s.cfg.Prefix, b.log, fmt.Sprintf("%020d-%020d.jsonl.gz", b.first(), b.last()))
}

func (s *s3) deliver(ctx context.Context, b *batch) error {
	var body bytes.Buffer
	z := gzip.NewWriter(&body)
	for _, r := range b.records {
		if _, err := z.Write(r.text); err != nil {
			return err
		}
	}
	if err := z.Close(); err != nil {
		return err
	}
	_, err := s.client.PutObject(ctx, s.cfg.Bucket, s.object(b), &body, int64(body.Len()), minio.PutObjectOptions{
		ContentType: "application/gzip", DisableMultipart: true, SendContentMd5: true,
	})
	if minio.ToErrorResponse(err).Code == "EntityTooLarge" {
		return &refusal{err: err, large: true}
	}
	return err
}

func (s *s3) close() { s.rt.CloseIdleConnections() }
