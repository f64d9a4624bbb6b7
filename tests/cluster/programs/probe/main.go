// probe is what ../../prove.sh runs in pods, to see of the cluster what a pod sees of it. It uses nothing of Kubernetes.
//
//	probe serve ADDRESS       answers HTTP with its host's name, and counts its starts in the folder $DATA; says where it listens
//	probe lookup NAME         prints the addresses of a name
//	probe get URL             prints what is there
//	probe certificate NAME    makes a certificate: writes NAME's tls.crt and tls.key into the current folder
//	probe webhook ADDRESS     admits objects over HTTPS, with the certificate in /certificate, unless they are labelled admit=no
package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

const (
	answerBytesMax = 1 << 20
	patience       = 5 * time.Second
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "probe:", err)
		os.Exit(1)
	}
}

func run(arguments []string) error {
	commands := map[string]func(string) error{
		"serve": serve, "lookup": lookup, "get": get, "certificate": certificate, "webhook": webhook,
	}
	if len(arguments) != 2 || commands[arguments[0]] == nil {
		return errors.New("usage: probe serve ADDRESS | lookup NAME | get URL | certificate NAME | webhook ADDRESS")
	}
	return commands[arguments[0]](arguments[1])
}

func serve(address string) error {
	name, err := os.Hostname()
	if err != nil {
		return err
	}
	if folder := os.Getenv("DATA"); folder != "" {
		starts, err := count(filepath.Join(folder, "starts"))
		if err != nil {
			return err
		}
		log.Println("starts:", starts)
	}
	answer := func(answer http.ResponseWriter, _ *http.Request) { fmt.Fprintln(answer, name) }
	return untilAsked(address, answer, (*http.Server).Serve)
}

// count adds a byte to a file and says how many it then has.
func count(path string) (int64, error) {
	file, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return 0, err
	}
	defer file.Close()
	if _, err := file.WriteString("."); err != nil {
		return 0, err
	}
	return file.Seek(0, io.SeekCurrent)
}

// untilAsked serves until the pod is asked to end.
func untilAsked(address string, answer http.HandlerFunc, serve func(*http.Server, net.Listener) error) error {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	log.Println("listening on", listener.Addr())
	server := &http.Server{Handler: answer, ReadHeaderTimeout: patience}
	asked, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	go func() {
		<-asked.Done()
		server.Close()
	}()
	if err := serve(server, listener); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

func lookup(name string) error {
	addresses, err := net.LookupHost(name)
	fmt.Println(strings.Join(addresses, "\n"))
	return err
}

func get(url string) error {
	client := http.Client{Timeout: patience}
	answer, err := client.Get(url)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answers %s", url, answer.Status)
	}
	_, err = io.Copy(os.Stdout, io.LimitReader(answer.Body, answerBytesMax))
	return err
}

// certificate makes one that vouches for itself.
func certificate(name string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	now := time.Now()
	subject := &x509.Certificate{
		SerialNumber:          big.NewInt(now.UnixNano()),
		Subject:               pkix.Name{CommonName: name},
		DNSNames:              []string{name},
		NotBefore:             now.Add(-time.Hour),
		NotAfter:              now.Add(24 * time.Hour),
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		IsCA:                  true,
		BasicConstraintsValid: true,
	}
	signed, err := x509.CreateCertificate(rand.Reader, subject, subject, &key.PublicKey, key)
	if err != nil {
		return err
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	if err := os.WriteFile("tls.crt", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: signed}), 0o644); err != nil {
		return err
	}
	return os.WriteFile("tls.key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret}), 0o600)
}

// review is as much of an AdmissionReview as is needed here.
type review struct {
	APIVersion string    `json:"apiVersion"`
	Kind       string    `json:"kind"`
	Request    *request  `json:"request,omitempty"`
	Response   *response `json:"response,omitempty"`
}

type request struct {
	UID    string `json:"uid"`
	Object struct {
		Metadata struct {
			Labels map[string]string `json:"labels"`
		} `json:"metadata"`
	} `json:"object"`
}

type response struct {
	UID     string `json:"uid"`
	Allowed bool   `json:"allowed"`
	Status  status `json:"status"`
}

type status struct {
	Message string `json:"message,omitempty"`
}

func webhook(address string) error {
	return untilAsked(address, admit, func(server *http.Server, listener net.Listener) error {
		return server.ServeTLS(listener, "/certificate/tls.crt", "/certificate/tls.key")
	})
}

func admit(answer http.ResponseWriter, asked *http.Request) {
	if asked.Method != http.MethodPost {
		return // the readiness probe's
	}
	var what review
	err := json.NewDecoder(io.LimitReader(asked.Body, answerBytesMax)).Decode(&what)
	if err != nil || what.Request == nil {
		http.Error(answer, "not an AdmissionReview", http.StatusBadRequest)
		return
	}
	decided := &response{UID: what.Request.UID, Allowed: what.Request.Object.Metadata.Labels["admit"] != "no"}
	if !decided.Allowed {
		decided.Status.Message = "the probe admits nothing labelled admit=no"
	}
	what.Request, what.Response = nil, decided
	answer.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(answer).Encode(what); err != nil {
		log.Println(err)
	}
}
